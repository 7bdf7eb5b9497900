"""What a worker can do, measured on its own device at start: what the router reckons with."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass

from workers.model_runner import ModelRunner, Row

_PREFILL_LENGTHS = (32, 128, 512, 2048)
_DECODE_BATCHES = (1, 4, 16, 64)
_MIN_REPEATS, _MAX_REPEATS, _ENOUGH_S = 2, 8, 0.05


@dataclass(frozen=True)
class Capability:
    """Measured seconds.

    Attributes:
        prefill: (prompt tokens, seconds) for one prompt, by length.
        decode: (sequences, seconds) for one step, by batch size.
    """

    prefill: tuple[tuple[int, float], ...] = ()
    decode: tuple[tuple[int, float], ...] = ()

    def prefill_seconds(self, num_tokens: int) -> float:
        """How long a prompt takes, interpolated; 0 when nothing was measured."""
        return _interpolate(self.prefill, num_tokens)

    def decode_seconds(self, batch_size: int) -> float:
        """How long a decode step takes, interpolated; 0 when nothing was measured."""
        return _interpolate(self.decode, batch_size)


def measure(runner: ModelRunner, role: str, *, max_tokens: int, max_num_seqs: int, budget_s: float = 1.5) -> Capability:
    """Time the model on this device, longer and longer until the budget is spent. Overwrites cache blocks: call first.

    Args:
        runner: the model; it is warm afterwards.
        role: "prefill" or "decode": what is measured.
        max_tokens: the longest prompt to try.
        max_num_seqs: the largest decode batch to try.
        budget_s: no further size is tried after this many seconds; the first one always is.
    """
    capacity = runner.kv_cache.shape[1] * runner.block_size
    started = time.monotonic()
    points: list[tuple[int, float]] = []
    if role == "prefill":
        smallest = min(_PREFILL_LENGTHS[0], max_tokens, capacity)
        sizes = sorted({smallest, *(n for n in _PREFILL_LENGTHS if n <= min(max_tokens, capacity))})
    else:
        sizes = [n for n in _DECODE_BATCHES if n == 1 or n <= min(max_num_seqs, runner.kv_cache.shape[1])]
    for size in sizes:
        rows = _prompt(runner, size) if role == "prefill" else _step(size)
        points.append((size, _best_time(runner, rows)))
        if time.monotonic() - started > budget_s:
            break
    return Capability(prefill=tuple(points)) if role == "prefill" else Capability(decode=tuple(points))


def _prompt(runner: ModelRunner, num_tokens: int) -> list[Row]:
    tokens = [i % runner.model.config.vocab_size for i in range(num_tokens)]
    return [Row(tokens, 0, range(-(-num_tokens // runner.block_size)))]


def _step(batch_size: int) -> list[Row]:
    return [Row((0,), 0, (block,)) for block in range(batch_size)]


def _best_time(runner: ModelRunner, rows: list[Row]) -> float:
    """The quickest of a few runs: the first ones are cold, and whatever else the machine does only ever slows one down.

    Short runs, which a neighbour distorts most, are repeated more often.
    """
    times: list[float] = []
    while len(times) < _MIN_REPEATS or (len(times) < _MAX_REPEATS and sum(times) < _ENOUGH_S):
        started = time.monotonic()
        runner.forward(rows).argmax(-1).cpu()
        times.append(time.monotonic() - started)
    return min(times)


def _interpolate(points: tuple[tuple[int, float], ...], size: int) -> float:
    """On the line through the two nearest points; beyond the last, in proportion to it."""
    if not points:
        return 0.0
    place = bisect_left(points, (size, 0.0))
    if place == len(points):
        return points[-1][1] * size / points[-1][0]
    if place == 0:
        return points[0][1]
    (low, low_s), (high, high_s) = points[place - 1], points[place]
    return low_s + (high_s - low_s) * (size - low) / (high - low)
