"""CUDA graphs of prefill: a short prompt alone is launched in a few dozen replays instead of some hundred kernels.

Launching a forward pass kernel by kernel takes the host longer than a GPU takes to compute a few hundred tokens, and
longer still beside other threads. A prompt that is a batch of its own runs as the next larger length of a ladder,
padded with tokens behind it: no token sees those behind it, and their keys and values are stored nowhere.

A forward pass is cut where a layer's keys and values are in the cache, and becomes a row of graphs, so that the
handoff of a layer begins while the next one is computed, as without graphs.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from attention.metadata import CommonAttentionMetadata
from workers.host_copies import to_device
from workers.models.causal_lm import CausalLM
from workers.runner.input_batch import Row

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of lengths captured so far and the number of all."""

_SIZES = (32, *range(64, 1025, 64))
"""Prompt lengths that get graphs. On an H200 an 8B model computes 512 tokens as fast as the host launches them."""

_SPARSE_SIZES = (*_SIZES, *range(1152, 2049, 128), *range(2304, 4097, 256))
"""Of models with experts, which compute less for a token and launch more: 2048 tokens of DeepSeek-V2-Lite took the host
46 ms, which is as long as the device computes some 4096."""

_NOWHERE = -1
_HEAD = 32
"""Numbers before the tokens, so that they begin where kernels read fastest; the first says where the last token is."""


def ladder(longest: int, max_position: int, sparse: bool = False) -> list[int]:
    """The prompt lengths that get graphs.

    Args:
        longest: the longest prompt that a step may compute whole.
        max_position: tokens that the model has positions for.
        sparse: whether the model has experts.
    """
    sizes = _SPARSE_SIZES if sparse else _SIZES
    return [size for size in sizes[: bisect_left(sizes, longest) + 1] if size <= max_position]


@dataclass(frozen=True)
class _Pass:
    """A captured forward pass.

    Attributes:
        pieces: graphs, one behind each other: up to each layer's attention, and the rest.
        common: what they read as the batch, for each cache group, and nobody else keeps.
        logits: (1, vocab) float32, written by the last one.
    """

    pieces: Sequence[torch.cuda.CUDAGraph]
    common: Sequence[CommonAttentionMetadata]
    logits: torch.Tensor


class PrefillGraphs:
    """The graphs, captured longest first, so that all of them fit into the memory of the longest.

    Attributes:
        sizes: prompt lengths, ascending.

    Args:
        model: on a GPU, its backend with `graph_safe_prefill`.
        kv_caches: of the worker, one a cache group.
        sizes: prompt lengths, multiples of 32.
        progress: told how far capturing is.
    """

    def __init__(
        self, model: CausalLM, kv_caches: Sequence[torch.Tensor], sizes: Sequence[int], progress: Progress | None = None
    ) -> None:
        self.sizes = sorted(sizes)
        self._model, self._kv_caches = model, kv_caches
        self._block_sizes = [group.block_size for group in model.kv_cache_groups]
        longest, device = self.sizes[-1], kv_caches[0].device
        self._input = torch.empty(_HEAD + (1 + len(self._block_sizes)) * longest, dtype=torch.int64, device=device)
        self._positions = torch.arange(longest, device=device)
        self._block_tables = [
            torch.zeros((1, -(-longest // block_size)), dtype=torch.int32, device=device)
            for block_size in self._block_sizes
        ]
        self._passes: dict[int, _Pass] = {}
        recorder, started = _Recorder(), time.monotonic()
        for size in reversed(self.sizes):
            self._passes[size] = self._capture(size, recorder)
            if progress is not None:
                progress(len(self._passes), len(self.sizes))
        logger.info(
            "captured prefill for %d prompt lengths up to %d in %.1f s", len(sizes), longest, time.monotonic() - started
        )

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the batch is one whole prompt that is short enough."""
        if len(rows) != 1:
            return False
        (row,) = rows
        return row.start == 0 and row.wants_logits and len(row.token_ids) <= self.sizes[-1]

    @torch.inference_mode()
    def run(self, row: Row, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute a prompt that `fits`; see `ModelRunner.forward`."""
        size = self.sizes[bisect_left(self.sizes, len(row.token_ids))]
        self._load(row, size)
        captured = self._passes[size]
        for layer, piece in enumerate(captured.pieces):
            piece.replay()
            if on_layer is not None and layer + 1 < len(captured.pieces):
                on_layer(layer)
        return captured.logits.clone()

    def _load(self, row: Row, size: int) -> None:
        """Bring a prompt to where the graphs of that size read it, in one copy."""
        length = len(row.token_ids)
        host = np.zeros(_HEAD + (1 + len(self._block_sizes)) * size, dtype=np.int64)
        host[0] = length - 1
        host[_HEAD : _HEAD + length] = row.token_ids
        positions = np.arange(length)
        for i, (table, block_size) in enumerate(zip(row.block_tables, self._block_sizes, strict=True)):
            blocks = np.asarray(table, dtype=np.int64)
            slots = host[self._slots(i, size)]
            slots[:length] = blocks[positions // block_size] * block_size + positions % block_size
            slots[length:] = _NOWHERE
        self._input[: len(host)].copy_(to_device(torch.from_numpy(host), self._input.device), non_blocking=True)

    @staticmethod
    def _slots(group: int, size: int) -> slice:
        """Where the slots of a cache group lie in the input of a pass."""
        begin = _HEAD + (1 + group) * size
        return slice(begin, begin + size)

    def _forward(
        self, size: int, common: Sequence[CommonAttentionMetadata], on_layer: Callable[[int], None]
    ) -> torch.Tensor:
        token_ids = self._input[_HEAD : _HEAD + size]
        hidden = self._model(token_ids, self._positions[:size], self._kv_caches, common, on_layer)
        logits: torch.Tensor = self._model.compute_logits(hidden.index_select(0, self._input[:1]))
        return logits

    @torch.inference_mode()
    def _capture(self, size: int, recorder: _Recorder) -> _Pass:
        device = self._input.device
        cu_seqlens_q = torch.tensor([0, size], dtype=torch.int32, device=device)
        seq_lens = torch.tensor([size], dtype=torch.int32, device=device)
        common = [
            CommonAttentionMetadata(
                cu_seqlens_q=cu_seqlens_q,
                seq_lens=seq_lens,
                block_tables=tables,
                slot_mapping=self._input[self._slots(i, size)],
                query_lens=(size,),
                context_lens=(size,),
                lasting=True,
            )
            for i, tables in enumerate(self._block_tables)
        ]
        self._input.zero_()[_HEAD + size :].fill_(_NOWHERE)
        self._forward(size, common, _nothing)  # what kernels and plans need at first cannot be captured
        with recorder.recording():
            logits = self._forward(size, common, recorder.cut)
        return _Pass(recorder.taken(), common, logits)


class _Recorder:
    """Records work as rows of graphs of one memory pool, each row to be replayed in its order, one at a time."""

    def __init__(self) -> None:
        gc.collect()  # what is collected while a graph is recorded can break it
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record this block; nothing in it runs."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                yield
            finally:
                self._graphs[-1].capture_end()

    def cut(self, layer: int) -> None:
        """End a graph and begin the next."""
        self._graphs[-1].capture_end()
        self._begin()

    def taken(self) -> list[torch.cuda.CUDAGraph]:
        """What was recorded since this was last asked."""
        graphs, self._graphs = self._graphs, []
        return graphs

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)


def _nothing(layer: int) -> None:
    """What is called at each layer when nobody waits for it."""
