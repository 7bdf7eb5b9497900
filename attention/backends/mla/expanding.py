"""Latent attention on a GPU: prefill over expanded keys, decode in the latents' space; kernels are the backends'.

What all of these backends do alike is here: they split a batch, store and read latents, expand them within bounds and
merge, absorb W_UK into queries and apply W_UV to what comes out.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch

from attention.backend import AttentionMetadata, AttentionMetadataBuilder
from attention.backends.common.batch_split import put, take
from attention.backends.mla.base import MLABackend, MLAImpl, refuse_all_masks
from attention.backends.mla.prefill_plan import ContextChunk, PrefillPlan, plan_prefill, workspace_tokens
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.ops.latent_attention import absorb, expand, expand_joined, read_latents, unabsorb, write_latents
from attention.ops.merge_attn_states import merge_attn_states
from attention.spec import AttentionSpec


@dataclass(frozen=True)
class Packed:
    """Packed queries and keys of the same sequences, aligned at the lower right corner.

    Attributes:
        cu_seqlens_q: (n + 1,) int32.
        cu_seqlens_k: (n + 1,) int32.
        query_lens: of each sequence.
        key_lens: of each sequence.
        causal: whether a query is kept from the keys behind it.
        lasting: see `CommonAttentionMetadata.lasting`.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    causal: bool
    lasting: bool = False


@dataclass(frozen=True)
class Expanded:
    """Keys and values of some tokens, expanded from their latents.

    Attributes:
        key: (S, Hq, D), or (S, Hq, D + P) where keys are joined with their rotary part; may be a view.
        rotary_key: (S, P).
        value: (S, Hq, V); may be a view.
    """

    key: torch.Tensor
    rotary_key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class DecodeBatch:
    """Sequences that bring one token.

    Attributes:
        tokens: (B1,) int64, their rows in T; None: all of T, in order.
        context_lens: tokens that each has, or at most has where the batch is replayed.
        seq_lens: (B1,) int32, on the device.
        block_tables: (B1, max_blocks) int32.
    """

    tokens: torch.Tensor | None
    context_lens: tuple[int, ...]
    seq_lens: torch.Tensor
    block_tables: torch.Tensor

    @property
    def num_seqs(self) -> int:
        """B1."""
        return len(self.context_lens)


@dataclass(frozen=True)
class ExpandingMetadata(AttentionMetadata):
    """A batch in its two parts, each with what the backend's kernel was told of it.

    Attributes:
        prefill: the plan of what is expanded; None: nothing is.
        prefill_calls: the kernel's plans, of the new tokens and then of each chunk of context.
        decode: None: no sequence brings one token.
        decode_call: the kernel's plan.
    """

    prefill: PrefillPlan | None
    prefill_calls: tuple[Any, ...]
    decode: DecodeBatch | None
    decode_call: Any


class ExpandingBuilder(AttentionMetadataBuilder):
    """Splits batches, plans what is expanded, and has the kernels' calls planned."""

    graph_safe_prefill = True
    graph_safe_decode = True

    def build(self, common: CommonAttentionMetadata) -> ExpandingMetadata:
        """See `AttentionMetadataBuilder.build`; waits for no device."""
        refuse_all_masks(common)
        prefilled = [] if common.decode_only else _prefilled(common)
        rows = None if len(prefilled) == common.num_seqs else _rows(common, prefilled)
        plan: PrefillPlan | None = None
        calls: tuple[Any, ...] = ()
        if prefilled:
            most_tokens = workspace_tokens(self.spec, self.dtype)
            plan = plan_prefill(common, prefilled, rows, self.block_size, most_tokens)
            lasting = common.lasting and not plan.context
            own = Packed(plan.cu_seqlens, plan.cu_seqlens, plan.lens, plan.lens, True, lasting)
            calls = (self.plan_attention(own, 0), *map(self._plan_context, plan.context, range(1, 1 << 30)))
        decode = _decode_batch(common, prefilled)
        return ExpandingMetadata(common, plan, calls, decode, None if decode is None else self.plan_decode(decode))

    def plan_attention(self, packed: Packed, index: int) -> Any:
        """What `ExpandingImpl.attend` is told of packed sequences.

        Args:
            packed: the sequences.
            index: of the call among those of its batch: plans of one batch are kept beside each other.
        """
        return packed

    def plan_decode(self, batch: DecodeBatch) -> Any:
        """What `ExpandingImpl.attend_latents` is told of a batch beside itself."""
        return None

    def _plan_context(self, chunk: ContextChunk, index: int) -> Any:
        sequences = Packed(chunk.cu_seqlens_q, chunk.cu_seqlens_k, chunk.query_lens, chunk.key_lens, False)
        return self.plan_attention(sequences, index)


class ExpandingImpl(MLAImpl):
    """One layer; arguments as of `MLAImpl`."""

    joins_keys: ClassVar[bool] = True
    """Whether `attend` wants every head's keys with the rotary part behind them."""

    def __init__(self, spec: AttentionSpec, kv_b_proj: torch.Tensor) -> None:
        super().__init__(spec, kv_b_proj)
        self._fp8 = spec.fp8_cache

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MLAImpl.forward`.

        Raises:
            AttentionInputError: tensors that do not fit the layer, or a batch that another backend planned.
        """
        if not isinstance(metadata, ExpandingMetadata):
            raise AttentionInputError(f"a batch planned for expanding backends, not {type(metadata).__name__}")
        cache = self.checked_cache(query, key, value, kv_cache)
        if key is not None and value is not None:
            write_latents(key, value, cache, metadata.common.slot_mapping, self.kv_scales.k)
        if output is None:
            output = query.new_empty(query.shape[0], self.spec.num_heads, self.mla.v_head_dim)
        plan, decode = metadata.prefill, metadata.decode
        if plan is not None:
            into = output if plan.tokens is None else output.new_empty(len(plan.tokens), *output.shape[1:])
            self._prefill(take(query, plan.tokens), self._own(key, value, cache, plan), cache, metadata, into)
            if plan.tokens is not None:
                put(output, plan.tokens, into)
        if decode is not None:
            into = output if decode.tokens is None else output.new_empty(len(decode.tokens), *output.shape[1:])
            self._decode(take(query, decode.tokens), cache, decode, metadata.decode_call, into)
            if decode.tokens is not None:
                put(output, decode.tokens, into)
        return output

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: Expanded, call: Any, output: torch.Tensor, wants_lse: bool
    ) -> torch.Tensor | None:
        """Ordinary attention from packed queries to packed keys.

        Args:
            query: (T, Hq, D + P).
            keys: (S, …).
            call: of the builder's `plan_attention`.
            output: (T, Hq, V), written.
            wants_lse: whether the logarithms are asked for.

        Returns:
            (T, Hq) float32, the natural logarithm of each softmax's denominator, where it is asked for.
        """

    @abstractmethod
    def attend_latents(
        self,
        query: torch.Tensor,
        rotary_query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: DecodeBatch,
        call: Any,
        output: torch.Tensor,
    ) -> None:
        """Attention over the latents themselves, from one token of each sequence.

        Args:
            query: (B, Hq, R), see `query_room`.
            rotary_query: (B, Hq, P).
            kv_cache: (num_blocks, block_size, R + P).
            batch: the sequences.
            call: of the builder's `plan_decode`.
            output: (B, Hq, R), written.
        """

    def query_room(self, rotary_query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for absorbed queries, (B, Hq, R), and the rotary ones where the kernel wants them."""
        shape = (*rotary_query.shape[:2], self.mla.kv_lora_rank)
        return rotary_query.new_empty(shape), rotary_query

    def _prefill(
        self,
        query: torch.Tensor,
        own: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        metadata: ExpandingMetadata,
        output: torch.Tensor,
    ) -> None:
        plan, calls = cast(PrefillPlan, metadata.prefill), metadata.prefill_calls
        lse = self.attend(query, self._expanded(own), calls[0], output, bool(plan.context))
        for chunk, call in zip(plan.context, calls[1:], strict=True):
            latents = read_latents(cache, chunk.slots, query.dtype, self.kv_scales.k)
            part, rows = query[chunk.queries], output[chunk.queries]
            attended = torch.empty_like(rows)
            of_chunk = self.attend(part, self._expanded(latents), call, attended, True)
            assert lse is not None
            assert of_chunk is not None
            so_far = lse[chunk.queries]
            merge_attn_states(rows, rows, so_far, attended, of_chunk, output_lse=so_far)

    def _decode(
        self, query: torch.Tensor, cache: torch.Tensor, batch: DecodeBatch, call: Any, output: torch.Tensor
    ) -> None:
        nope, rotary = query.split((self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim), dim=-1)
        absorbed, rotary = self.query_room(rotary)
        absorb(nope, self.w_uk, absorbed)
        attended = torch.empty(absorbed.shape, dtype=query.dtype, device=query.device)
        self.attend_latents(absorbed, rotary, cache, batch, call, attended)
        unabsorb(attended, self.w_uv, output)

    def _own(
        self, key: torch.Tensor | None, value: torch.Tensor | None, cache: torch.Tensor, plan: PrefillPlan
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """New tokens' latents and rotary keys: as they come, or as an FP8 cache holds them."""
        if self._fp8 or key is None or value is None:
            return read_latents(cache, plan.slots, self.kv_b_proj.dtype, self.kv_scales.k)
        return take(key, plan.tokens), take(value, plan.tokens)

    def _expanded(self, latents: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Expanded:
        mla = self.mla
        if isinstance(latents, torch.Tensor):
            kv_c, k_pe = latents.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        else:
            kv_c, k_pe = latents
        if self.joins_keys:
            key, value = expand_joined(kv_c, k_pe, self.w_uk, self.w_uv)
        else:
            key, value = expand(kv_c, self.kv_b_proj, self.spec.num_heads, mla.qk_nope_head_dim)
        return Expanded(key, k_pe, value)


class ExpandingBackend(MLABackend):
    """A backend of this kind: its kernels are those of its `impl_class` and `builder_class`."""

    metadata_class = ExpandingMetadata
    builder_class = ExpandingBuilder


def _prefilled(common: CommonAttentionMetadata) -> list[int]:
    """Sequences whose tokens attend over expanded keys: all where nothing is cached, else those that bring several."""
    whole = common.query_lens == common.context_lens
    return [i for i, n in enumerate(common.query_lens) if whole or n > 1]


def _rows(common: CommonAttentionMetadata, sequences: list[int]) -> np.ndarray:
    begins = np.concatenate(([0], np.cumsum(common.query_lens, dtype=np.int64)))
    if not sequences:
        return begins[:0]
    return np.concatenate([np.arange(begins[i], begins[i + 1], dtype=np.int64) for i in sequences])


def _decode_batch(common: CommonAttentionMetadata, prefilled: list[int]) -> DecodeBatch | None:
    if not prefilled:
        return DecodeBatch(None, common.context_lens, common.seq_lens, common.block_tables) if common.num_seqs else None
    others = sorted(set(range(common.num_seqs)) - set(prefilled))
    if not others:
        return None
    device = common.block_tables.device
    chosen = torch.tensor(others, dtype=torch.int64).to(device)
    tokens = torch.from_numpy(_rows(common, others)).to(device)
    lens = tuple(common.context_lens[i] for i in others)
    return DecodeBatch(tokens, lens, common.seq_lens[chosen], common.block_tables[chosen])
