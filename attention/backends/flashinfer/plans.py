"""Planned batches: each knows the kernel that runs it. The library is the builder's to import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attention.backend import KVScales
from attention.backends.common.batch_split import gather_kv, kv_rows, token_slots
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata

_LASTING_PLAN_BYTES = 2 << 20
"""Of a plan that is kept: FlashInfer's own buffers have room for the largest batches, 8 MiB of pinned memory each."""


@dataclass(frozen=True)
class Tensors:
    """What one layer brings to one batch.

    Attributes:
        query: (T, Hq, D).
        key: (T, Hkv, D); None: in the cache already.
        value: (T, Hkv, D), or None with `key`.
        kv_cache: the layer's cache, this batch's keys and values in it; None where nothing is cached.
        output: (T, Hq, D), contiguous, written.
        sinks: (Hq,) float32, where the layer has them.
        scales: of an FP8 cache.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    kv_cache: torch.Tensor | None
    output: torch.Tensor
    sinks: torch.Tensor | None
    scales: KVScales

    def cache(self) -> torch.Tensor:
        """The cache.

        Raises:
            AttentionInputError: there is none.
        """
        if self.kv_cache is None:
            raise AttentionInputError("keys and values are neither given nor in a cache")
        return self.kv_cache


class Plan(Protocol):
    """A planned batch."""

    def run(self, tensors: Tensors) -> None:
        """Attend and write the output."""


class PlannedWrapper:
    """One of FlashInfer's wrappers, which holds one plan at a time.

    Planning writes to pinned memory and copies it to the device in the background: the next plan waits for the copy.
    """

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._plans = 0
        self._copied: torch.cuda.Event | None = None

    def plan(self, *args: Any, **kwargs: Any) -> Planned:
        """Plan a batch; the one before is gone."""
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(*args, **kwargs)
        self._copied = torch.cuda.Event()
        self._copied.record()
        self._plans += 1
        return Planned(self, self._plans)

    def current(self, number: int) -> Any:
        """The wrapper, if that plan is the one that it holds.

        Raises:
            AttentionInputError: another batch was planned since.
        """
        if number != self._plans:
            raise AttentionInputError("this batch's plan is gone: the builder has planned another batch since")
        return self.wrapper


def give_room_for_plan(wrapper: Any, scratch: torch.Tensor) -> PlannedWrapper:
    """A wrapper whose plan is kept, with a place of its own for it, no larger than one needs.

    Args:
        wrapper: of FlashInfer.
        scratch: uint8, which it shares with others.
    """
    plan = torch.empty(_LASTING_PLAN_BYTES, dtype=torch.uint8, device=scratch.device)
    wrapper.reset_workspace_buffer(scratch, plan)
    return PlannedWrapper(wrapper)


@dataclass(frozen=True)
class Planned:
    """A plan that a wrapper held when it was made.

    Attributes:
        owner: the wrapper.
        number: counts its plans.
    """

    owner: PlannedWrapper
    number: int

    def run(self, output: torch.Tensor, wants_lse: bool, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Run it; returns the base-2 logarithms of the softmaxes' denominators, (T, Hq) float32, where asked for."""
        attended = self.owner.current(self.number).run(*args, out=output, return_lse=wants_lse, **kwargs)
        return attended[1] if wants_lse else None


@dataclass(frozen=True)
class RaggedPrefill:
    """Sequences that bring all of their tokens: nothing is read from the cache.

    Attributes:
        planned: of a ragged prefill wrapper.
        common: the batch, whose block tables say where the cache holds the keys if the layer does not bring them.
    """

    planned: Planned
    common: CommonAttentionMetadata

    def run(self, tensors: Tensors) -> None:
        """See `Plan.run`."""
        key, value = tensors.key, tensors.value
        if key is None or value is None:
            cache = tensors.cache()
            block_size = cache.shape[2]
            key, value = gather_kv(cache, kv_rows(token_slots(self.common, block_size), block_size))
        wants_lse = tensors.sinks is not None
        lse = self.planned.run(tensors.output, wants_lse, tensors.query, key, value)
        put_sinks(tensors, lse)


@dataclass(frozen=True)
class Paged:
    """Queries of any number over the paged cache.

    Attributes:
        planned: of a paged prefill or decode wrapper.
        fp8: whether the cache is FP8.
    """

    planned: Planned
    fp8: bool

    def run(self, tensors: Tensors) -> None:
        """See `Plan.run`."""
        put_sinks(tensors, self.attend(tensors, tensors.output, tensors.sinks is not None))

    def attend(self, tensors: Tensors, output: torch.Tensor, wants_lse: bool) -> torch.Tensor | None:
        """Without sinks; see `Planned.run`."""
        scales = {"k_scale": tensors.scales.k, "v_scale": tensors.scales.v} if self.fp8 else {}
        return self.planned.run(output, wants_lse, tensors.query, tensors.cache(), **scales)


@dataclass(frozen=True)
class Cascade:
    """A common prefix once for all sequences, then what each has of its own, then both merged (arXiv:2501.01005).

    Attributes:
        prefix: all queries over the prefix.
        suffix: every sequence's queries over the rest.
        merge: `flashinfer.cascade.merge_state_in_place`.
    """

    prefix: Paged
    suffix: Paged
    merge: Any

    def run(self, tensors: Tensors) -> None:
        """See `Plan.run`."""
        apart = torch.empty_like(tensors.output)
        lse = self.suffix.attend(tensors, tensors.output, True)
        self.merge(tensors.output, lse, apart, self.prefix.attend(tensors, apart, True))
        put_sinks(tensors, lse)


@dataclass(frozen=True)
class XqaDecode:
    """One query for each sequence, by TensorRT-LLM's XQA. Nothing was planned: lengths are read on the device.

    Attributes:
        xqa: `flashinfer.xqa.xqa`.
        block_tables: (B, max_blocks) int32.
        seq_lens: (B, 1) uint32.
        window: tokens, 0 for all.
        scale: multiplies q·k.
        scratch: uint8.
        semaphores: uint32, zeros.
        sm_count: processors of the device.
    """

    xqa: Any
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    window: int
    scale: float
    scratch: torch.Tensor
    semaphores: torch.Tensor
    sm_count: int

    def run(self, tensors: Tensors) -> None:
        """See `Plan.run`."""
        cache = tensors.cache()
        _, _, block_size, num_kv_heads, head_size = cache.shape
        self.xqa(
            tensors.query.contiguous().unsqueeze(1),
            cache[:, 0],
            cache[:, 1],
            self.block_tables,
            self.seq_lens,
            tensors.output.unsqueeze(1),
            self.scratch,
            self.semaphores,
            num_kv_heads,
            block_size,
            sinks=None if tensors.sinks is None else tensors.sinks.view(num_kv_heads, -1),
            q_scale=self.scale * math.sqrt(head_size),
            sliding_win_size=self.window,
            sm_count=self.sm_count,
        )


def put_sinks(tensors: Tensors, lse: torch.Tensor | None) -> None:
    """Scale the output down by what the sinks take of each softmax: exact, the denominator being known.

    Args:
        tensors: the layer's; its output is changed.
        lse: (T, Hq) float32, base 2.
    """
    if tensors.sinks is not None and lse is not None:
        tensors.output.mul_(torch.sigmoid(lse * math.log(2.0) - tensors.sinks).unsqueeze(-1))
