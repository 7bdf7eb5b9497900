"""Ranks that keep the same are each sent a share of it, and give each other the rest: a scatter, then an all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kv_transfer.connector import ReadyEvent
from workers.host_copies import to_device
from workers.parallel.group import TensorParallelGroup
from workers.runner.model_runner import indexable


class Exchange(Protocol):
    """Completes blocks of which this rank, and each that keeps the same, was sent its share of the layers."""

    @property
    def written(self) -> ReadyEvent | None:
        """Happens when nothing is written to a block any more that was completed before; None: nothing is."""
        ...

    def complete(self, group: int, blocks: Sequence[int]) -> None:
        """Write to these blocks of a cache group the layers that other ranks were sent. All ranks call it together."""
        ...


class ShareExchange:
    """Completes blocks by collectives, queued on the device before whatever is queued there from now on; no waiting.

    Whose share is which layer, `kv_transfer.layout.KVLayout.share` says.

    Args:
        kv_caches: the rank's, by cache group, (layers, num_blocks, *block).
        copies: by cache group, how many ranks, neighbours of each other, keep the same.
        group: the ranks of the worker.
        workspace_bytes: what is received at once.
    """

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor],
        copies: Sequence[int],
        group: TensorParallelGroup,
        workspace_bytes: int = 32 << 20,
    ) -> None:
        self._kv_caches = [indexable(kv_cache) for kv_cache in kv_caches]
        self._copies = tuple(copies)
        self._group = group
        self._workspace_bytes = workspace_bytes
        self._written: torch.cuda.Event | None = None

    @property
    def written(self) -> ReadyEvent | None:
        """See `Exchange.written`; None on a CPU, where `complete` has written on return."""
        return self._written

    @torch.inference_mode()
    def complete(self, group: int, blocks: Sequence[int]) -> None:
        """See `Exchange.complete`.

        Raises:
            TensorParallelError: a rank is lost.
        """
        copies, kv_cache = self._copies[group], self._kv_caches[group]
        if copies == 1 or not blocks:
            return
        most_layers = -(-len(kv_cache) // copies)
        block_bytes = kv_cache[0, 0].numel() * kv_cache.element_size()
        at_once = max(1, self._workspace_bytes // (block_bytes * most_layers * self._group.size))
        index = to_device(torch.tensor(list(blocks)), kv_cache.device)
        for piece in index.split(at_once):
            self._exchange(kv_cache, copies, most_layers, piece)
        if kv_cache.device.type == "cuda":
            self._written = torch.cuda.Event()
            self._written.record()

    def _exchange(self, kv_cache: torch.Tensor, copies: int, most_layers: int, blocks: torch.Tensor) -> None:
        """Some blocks, in one collective. Shares that have a layer less than others are sent with room for it."""
        own = self._group.rank % copies
        sent = kv_cache.new_empty(most_layers, len(blocks), *kv_cache.shape[2:])
        for layer, room in zip(kv_cache[own::copies], sent, strict=False):
            torch.index_select(layer, 0, blocks, out=room)
        received = self._group.all_gather_parts(sent.view(torch.uint8)).view(sent.dtype)
        first = self._group.rank - own
        for place in range(copies):
            if place != own:
                for layer, blocks_of_layer in zip(kv_cache[place::copies], received[first + place], strict=False):
                    layer.index_copy_(0, blocks, blocks_of_layer)
