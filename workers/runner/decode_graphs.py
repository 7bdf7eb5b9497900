"""CUDA graphs of the decode step: one for each batch size of a ladder, captured once, replayed at every step.

A replayed graph costs the host one launch instead of some hundred. A batch between two rungs runs as the next larger
one, with padding rows.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of graphs captured so far and the number of all."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work once, recording it, and returns what runs it again."""


def ladder(max_num_seqs: int) -> list[int]:
    """The batch sizes that get a graph: 1, 2, 4, then every 8 up to 256, then every 32, and `max_num_seqs` itself."""
    rungs = (1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs, 32))
    return [size for size in rungs if size < max_num_seqs] + [max_num_seqs]


def next_size(sizes: list[int], num_rows: int) -> int:
    """The smallest of the ascending `sizes` that holds so many rows."""
    return sizes[bisect_left(sizes, num_rows)]


class DecodeGraphs:
    """The graphs, captured largest first, so that all of them fit into the memory of the largest.

    Attributes:
        sizes: batch sizes, ascending.
        num_bytes: device memory that the graphs take.

    Args:
        step: computes a step of so many rows, from and to the same memory every time, without waiting for the device.
        sizes: batch sizes.
        progress: told how far capturing is.
        capture: how work is recorded; None: as CUDA graphs that share one memory pool.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        sizes: list[int],
        progress: Progress | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.sizes = sorted(sizes)
        self._replays: dict[int, Callable[[], None]] = {}
        started, free = time.monotonic(), _free_memory()
        capture = capture or shared_pool_capture()
        for size in reversed(self.sizes):
            step(size)  # kernels are compiled and libraries set up at their first call, which cannot be captured
            self._replays[size] = capture(partial(step, size))
            if progress is not None:
                progress(len(self._replays), len(self.sizes))
        self.num_bytes = free - _free_memory()
        logger.info(
            "captured the decode step for %d batch sizes up to %d in %.1f s; the graphs take %.2f GiB",
            len(self.sizes), self.sizes[-1], time.monotonic() - started, self.num_bytes / 2**30,
        )  # fmt: skip

    def replay(self, size: int) -> None:
        """Run the step of one of the sizes."""
        self._replays[size]()


def shared_pool_capture() -> Capture:
    """Captures CUDA graphs that are never replayed at the same time, in one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture


def _free_memory() -> int:
    """Bytes of the GPU that nobody has; PyTorch's own spare memory is given back first. 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
