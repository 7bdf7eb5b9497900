"""How long work takes on a device, and how fast that device moves and multiplies."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UPS, _MIN_REPEATS, _MAX_REPEATS, _ENOUGH_S = 2, 5, 50, 0.1


@dataclass(frozen=True)
class Timing:
    """Medians and spread of one kind of work.

    Attributes:
        seconds: median of one call.
        spread: (slowest - fastest) / median over the middle half of the repeats.
        graph: whether the calls were replayed as a CUDA graph, so that launching them costs nothing.
    """

    seconds: float
    spread: float
    graph: bool


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, graph: bool = False, enough_s: float = _ENOUGH_S
) -> Timing:
    """Time calls that do the same to different data, one after the other, so that no cache holds what the next reads.

    Args:
        calls: at least one.
        device: where they run.
        graph: whether to capture them in a CUDA graph, if they can be.
        enough_s: how long to repeat them, if that is often enough.
    """
    for _ in range(_WARM_UPS):
        for call in calls:
            call()
    synchronize(device)
    captured = _capture(calls) if graph and device.type == "cuda" else None
    run = captured.replay if captured is not None else _in_turn(calls)
    run()
    synchronize(device)
    times: list[float] = []
    while len(times) < _MIN_REPEATS or (len(times) < _MAX_REPEATS and sum(times) < enough_s):
        times.append(_once(run, device))
    times.sort()
    quarter = len(times) // 4
    middle = times[quarter : len(times) - quarter]
    median = statistics.median(times)
    return Timing(median / len(calls), (middle[-1] - middle[0]) / median, captured is not None)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written in a second by a large copy."""
    size = 2 << 30 if device.type == "cuda" else 128 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / time_calls([lambda: target.copy_(source)], device).seconds


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations in a second of a large matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / time_calls([lambda: torch.mm(a, b, out=out)], device).seconds


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what nothing holds any more, so that what comes next finds the device as it was."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:  # something in there waits for the device
        torch.cuda.synchronize()
        return None
    return graph


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
