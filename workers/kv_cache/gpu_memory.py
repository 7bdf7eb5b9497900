"""What a worker holds on its GPU, measured, and what that leaves for the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_CONTEXT_LIMIT = 1536 * 2**20
_LATER = 768 * 2**20
"""Kept for what a worker takes after its cache: CUDA graphs, kernels that are loaded at their first call, what choosing
tokens takes beside the logits."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on a GPU that holds the model and no KV cache, after the worker's largest batches have run.

    Attributes:
        total: the card's.
        free: of the card, now.
        allocated: in tensors of this process: weights, and the buffers that stay.
        reserved: taken by torch for this process, now.
        peak: the most that torch had taken while the batches ran.
    """

    total: int
    free: int
    allocated: int
    reserved: int
    peak: int

    @property
    def context(self) -> int:
        """This process's CUDA context and libraries.

        It is what is in use on the card outside of torch, as far as that is plausible for one process: the rest belongs
        to other processes, which a process cannot tell from its own share.
        """
        return max(0, min(self.total - self.free - self.reserved, _CONTEXT_LIMIT))

    @property
    def activations(self) -> int:
        """What the largest batches needed beside what stays."""
        return self.peak - self.allocated

    @property
    def own(self) -> int:
        """All that this process needs in its largest batches, the KV cache aside."""
        return self.peak + self.context

    def share(self, utilization: float) -> int:
        """What is left for a KV cache of the process's share of the card; negative when the share is too small."""
        return int(self.total * utilization) - self.own - _LATER

    @property
    def available(self) -> int:
        """What a KV cache can take of the memory that is really free, whatever the share."""
        return self.free - (self.peak - self.reserved) - _LATER


def measure_gpu_memory(device: str, run: Callable[[], object] | None = None) -> GpuMemory:
    """Run the largest batches and see what they need.

    One worker in a process: torch counts what the process holds. Workers of other processes may start beside it.

    Args:
        device: "cuda", or one with an index.
        run: runs them; it leaves nothing allocated but what will stay. None: nothing is run.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if run is not None:
        run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(total, free, torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), peak)
