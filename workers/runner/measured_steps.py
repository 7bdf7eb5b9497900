"""Measures what a worker can do on its own device, at start: see `workers.runner.step_times`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attention.kv_cache import KVCacheSpec
from workers.kv_cache.tables import BlockTable, SequenceTables
from workers.runner.decode_runner import DecodeRunner
from workers.runner.measured_tables import measured_tables, most_measured_tokens
from workers.runner.model_runner import ModelRunner, Row
from workers.runner.step_times import StepTimes
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

_PREFILL_LENGTHS = (32, 128, 512, 2048)
_DECODE_BATCHES = (1, 4, 16, 64, 256)
MIN_REPEATS, MAX_REPEATS, _ENOUGH_S = 2, 8, 0.05
"""Each size is run at least, and at most, so often; no more once so many seconds have gone by."""
_STEPS_IN_A_ROW, _PROBE_TOKENS = 4, 2
_KV_TOKENS = (512, 4096, 16_384, 65_536)
"""Of all sequences of a batch; on a large GPU with a model of eight billion parameters the last is half a step."""


Agree = Callable[[float], float]
"""Turns seconds that a rank has measured into what all ranks of the worker go by: they must measure equally often."""


def measure_prefill(runner: ModelRunner, *, max_tokens: int, budget_s: float = 1.5, agree: Agree = float) -> StepTimes:
    """Time one prompt on this device, longer and longer until the budget is spent. Overwrites cache blocks: call first.

    Args:
        runner: the model; it is warm afterwards.
        max_tokens: the longest prompt to try.
        budget_s: no longer one is tried after so many seconds of trying; the first one always is.
        agree: between ranks.
    """
    capacity = most_measured_tokens(runner.groups, runner.num_blocks)
    most = max_tokens if capacity is None else min(max_tokens, capacity)
    sizes = sorted({min(_PREFILL_LENGTHS[0], most), *(n for n in _PREFILL_LENGTHS if n <= most)})

    def run(size: int) -> float:
        rows = _prompt(runner, size)
        return _seconds(lambda: runner.forward(rows).argmax(-1).tolist())

    return StepTimes(prefill=_measure(sizes, run, budget_s, agree))


def measure_decode(
    decoder: DecodeRunner[Any],
    *,
    groups: Sequence[KVCacheSpec],
    num_blocks: Sequence[int],
    max_num_seqs: int,
    max_model_len: int,
    budget_s: float = 1.5,
    agree: Agree = float,
) -> StepTimes:
    """Time a decode step on this device. Overwrites cache blocks.

    Larger and larger batches first, of sequences as short as can be; then the largest of them with more and more tokens
    in the cache, in blocks that no two share, as far as they are there. Either ends when its half of the budget is
    spent. The slope between the fewest and the most tokens is what a token adds.

    Args:
        decoder: of the worker, with nothing in flight.
        groups: of its cache.
        num_blocks: of each group's tensor.
        max_num_seqs: the largest batch to try.
        max_model_len: tokens that a sequence may have; where it is short, fewer steps are timed in a row, and none
            where no token can follow a prompt.
        budget_s: nothing larger is tried after so many seconds of trying; the first one always is.
        agree: between ranks.
    """
    steps = min(_STEPS_IN_A_ROW, max_model_len - _PROBE_TOKENS + 1)
    if steps < 1:
        return StepTimes()

    def batch_of(size: int, num_tokens: int) -> list[_Probe]:
        slots = num_tokens + steps - 1
        return [_Probe(_tables(groups, num_blocks, slots, i), num_tokens) for i in range(size)]

    def run(size: int) -> float:
        return _decode_seconds(decoder, batch_of(size, _PROBE_TOKENS), steps)

    fewest = min(num_blocks)
    sizes = [n for n in _DECODE_BATCHES if n == 1 or n <= min(max_num_seqs, fewest)]
    decode = _measure(sizes, run, budget_s / 2, agree)
    batch_size = decode[-1][0]
    most = max_model_len - steps
    for spec, count in zip(groups, num_blocks, strict=True):
        if spec.window is None:
            most = min(most, count // batch_size * spec.block_size - steps)

    def run_long(kv_tokens: int) -> float:
        batch = batch_of(batch_size, kv_tokens // batch_size)
        _decode_seconds(decoder, batch, 1)  # their block tables get to the device
        return _decode_seconds(decoder, batch, steps - 1)

    if steps < 2 or most * batch_size < _KV_TOKENS[0]:
        return StepTimes(decode=decode)
    few, *more = dict.fromkeys(min(tokens, most * batch_size) for tokens in _KV_TOKENS)
    points = _measure([few, *more], run_long, budget_s / 2, agree)
    return StepTimes(decode=decode, kv_token_s=_slope(points))


def _decode_seconds(decoder: DecodeRunner[Any], batch: list[_Probe], steps: int) -> float:
    """Of each of so many steps in a row."""

    def launch_all() -> None:
        for _ in range(steps):
            launched = decoder.launch(batch)
            for probe in batch:
                probe.num_scheduled, probe.last_token = probe.num_scheduled + 1, None
        launched.sampled.token_ids()

    return _seconds(launch_all) / steps


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Seconds for each token between the first point and the last, not negative; 0 where there is one alone."""
    (few, few_s), (most, most_s) = points[0], points[-1]
    return max(0.0, most_s - few_s) / (most - few) if most > few else 0.0


_GREEDY = SamplingState(SamplingParams(temperature=0.0, seed=0), as_token_ids((0,)), frozenset(), _PROBE_TOKENS)
"""As decode's sampler sees every probe; nothing changes it."""


@dataclass(eq=False)
class _Probe:
    """A sequence that is only there to be timed: the shortest that decodes, a prompt's token and an output's."""

    tables: SequenceTables
    num_scheduled: int = _PROBE_TOKENS
    last_token: int | None = 0
    state: SamplingState = field(default_factory=lambda: _GREEDY)


def _measure(
    sizes: Sequence[int], run: Callable[[int], float], budget_s: float, agree: Agree
) -> tuple[tuple[int, float], ...]:
    """(size, seconds) for sizes in order, until the budget is spent.

    The quickest of a few runs counts: the first ones are cold, and whatever else the machine does only ever slows one
    down. Short runs, which a neighbour distorts most, are repeated more often. Nothing here looks at a rank's own clock
    but through `agree`.
    """
    spent = 0.0
    points: list[tuple[int, float]] = []
    for size in sizes:
        times: list[float] = []
        while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and sum(times) < _ENOUGH_S):
            times.append(agree(run(size)))
        points.append((size, min(times)))
        spent += sum(times)
        if spent > budget_s:
            break
    return tuple(points)


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _prompt(runner: ModelRunner, num_tokens: int) -> list[Row]:
    tokens = [i % runner.model.config.vocab_size for i in range(num_tokens)]
    return [Row(tokens, 0, measured_tables(runner.groups, runner.num_blocks, num_tokens))]


def _tables(groups: Sequence[KVCacheSpec], num_blocks: Sequence[int], num_tokens: int, index: int) -> SequenceTables:
    tables = SequenceTables([BlockTable(blocks) for blocks in measured_tables(groups, num_blocks, num_tokens, index)])
    tables.num_slots = num_tokens
    return tables
