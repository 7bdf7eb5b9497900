"""The points at which an engine is measured without a service, and how: the same code drives Baton and its peers.

Imports nothing but the standard library: it also runs in a peer's environment.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

PREFILL_POINTS = ("1x2048", "32x2048", "1x8000")
DECODE_POINTS = ("1x192", "16x192", "64x192", "256x192", "64x4064")
SAMPLED_POINTS = ("1x192", "64x192", "256x192")
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of the sampled points; all others are greedy."""

_SLACK_STEPS = 24
"""Steps that an engine may run while requests are still being handed over."""


class MeasuredEngine(Protocol):
    """An engine that is stepped by its caller."""

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool) -> None:
        """Take a request that generates exactly `max_tokens` tokens."""
        ...

    def step(self) -> int:
        """Go on; returns how many tokens came out."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        ...


@dataclass(frozen=True)
class Point:
    """So many sequences of so many tokens: of prompt in prefill; in decode of context, in the middle of the run."""

    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """From such as "64x4064".

        Raises:
            argparse.ArgumentTypeError: it is not two positive numbers.
        """
        batch, cross, tokens = text.partition("x")
        if not (cross and batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
            raise argparse.ArgumentTypeError(f"{text!r} must be BATCHxTOKENS, such as 64x4064")
        return cls(int(batch), int(tokens))

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class PrefillTimes:
    """Seconds from the first prompt handed over to the last first token; one for each repeat."""

    point: str
    seconds: tuple[float, ...]
    tokens_per_s: float


@dataclass(frozen=True)
class DecodeTimes:
    """Steps in which every sequence of the batch got a token.

    Attributes:
        point: batch and context that were asked for.
        sampled: whether with temperature and top-p.
        steps: measured ones, of all repeats.
        context: tokens that a sequence had in the middle of the measured steps.
        means: mean seconds of a step, of each repeat.
        mean: their median.
        p50: median of all steps.
        p99: of all steps.
    """

    point: str
    sampled: bool
    steps: int
    context: float
    means: tuple[float, ...]
    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Plan:
    """How thoroughly points are measured.

    Attributes:
        repeats: measured runs of each prefill point.
        decode_repeats: measured runs of each decode point.
        steps: decode steps of each run.
        warmup: full steps before them, not counted.
        max_num_batched_tokens: of the engine; says how long a batch takes to fill.
        vocab_size: token ids are below it.
        seed: of the prompts.
    """

    repeats: int
    decode_repeats: int
    steps: int
    warmup: int
    max_num_batched_tokens: int
    vocab_size: int
    seed: int = 0

    def prompt_tokens(self, point: Point) -> int:
        """The prompt's length, so that the context in the middle of the measured steps is the point's."""
        return max(1, point.tokens - self.warmup - self.steps // 2)

    def max_tokens(self, point: Point) -> int:
        """Enough that the first sequence still runs when the last one, which is prefilled last, has been measured."""
        filling = -(-point.batch * self.prompt_tokens(point) // self.max_num_batched_tokens)
        return 1 + filling + self.warmup + self.steps + _SLACK_STEPS

    def longest(self, prefill: Sequence[Point], decode: Sequence[Point]) -> int:
        """Tokens of the longest sequence of all points."""
        lengths = [point.tokens + 1 for point in prefill]
        lengths += [self.prompt_tokens(point) + self.max_tokens(point) for point in decode]
        return max(lengths)


def add_point_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which points are measured, and how thoroughly."""
    points = parser.add_argument_group("points")
    for flag, default in (("prefill", PREFILL_POINTS), ("decode", DECODE_POINTS), ("sampled", SAMPLED_POINTS)):
        points.add_argument(
            f"--{flag}", type=Point.parse, nargs="*", default=[Point.parse(p) for p in default], metavar="BxT"
        )
    points.add_argument("--repeats", type=int, default=5, metavar="N", help="of a prefill point (default: 5)")
    points.add_argument("--decode-repeats", type=int, default=2, metavar="N", help="of a decode point (default: 2)")
    points.add_argument("--steps", type=int, default=128, metavar="N", help="of a decode run (default: 128)")
    points.add_argument("--warmup", type=int, default=8, metavar="N", help="decode steps before (default: 8)")
    points.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    points.add_argument(
        "--turn", type=Path, metavar="FILE", help="a lock: engines that start side by side measure in turns"
    )
    points.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts")


@contextmanager
def own_turn(lock: Path | None) -> Iterator[None]:
    """Measure while nobody else does who asks for the same lock; None: at once."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def plan_of(args: argparse.Namespace, vocab_size: int) -> Plan:
    """The plan that the flags describe."""
    return Plan(
        args.repeats,
        args.decode_repeats,
        args.steps,
        args.warmup,
        args.max_num_batched_tokens,
        vocab_size,
        args.seed,
    )


def measure_prefill(engine: MeasuredEngine, point: Point, plan: Plan) -> PrefillTimes:
    """Time a batch of prompts from handing over the first to the last first token; the first run does not count."""
    rng = random.Random(f"{plan.seed}/prefill/{point}")
    seconds = []
    for run in range(plan.repeats + 1):
        prompts = [_prompt(rng, point.tokens, plan) for _ in range(point.batch)]
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add(f"prefill-{point}-{run}-{number}", prompt, 1, False)
        while engine.busy:
            engine.step()
        seconds.append(time.perf_counter() - started)
    measured = tuple(seconds[1:])
    return PrefillTimes(str(point), measured, point.batch * point.tokens / statistics.median(measured))


def measure_decode(engine: MeasuredEngine, point: Point, plan: Plan, sampled: bool = False) -> DecodeTimes:
    """Time the steps in which the whole batch decodes; the first run does not count.

    Raises:
        ValueError: the batch was never whole for that many steps.
    """
    rng = random.Random(f"{plan.seed}/decode/{point}")
    prompt_tokens, max_tokens = plan.prompt_tokens(point), plan.max_tokens(point)
    means, intervals, context = [], [], 0.0
    for run in range(plan.decode_repeats + 1):
        for number in range(point.batch):
            prompt = _prompt(rng, prompt_tokens, plan)
            engine.add(f"decode-{point}-{sampled}-{run}-{number}", prompt, max_tokens, sampled)
        arrivals = []
        while engine.busy:
            count = engine.step()
            arrivals.append((time.perf_counter(), count))
        if run > 0:
            found, generated = full_steps(arrivals, point.batch, plan.warmup, plan.steps)
            context = prompt_tokens + generated
            means.append(statistics.fmean(found))
            intervals += found
    return DecodeTimes(
        str(point),
        sampled,
        len(intervals),
        context,
        tuple(means),
        statistics.median(means),
        statistics.median(intervals),
        _quantile(intervals, 0.99),
    )


def full_steps(arrivals: Sequence[tuple[float, int]], batch: int, warmup: int, steps: int) -> tuple[list[float], float]:
    """Intervals between steps that brought a token for every sequence, and the tokens a sequence had in their middle.

    Args:
        arrivals: (time, tokens) of each step, in order.
        batch: sequences.
        warmup: full steps left out.
        steps: intervals wanted.

    Raises:
        ValueError: there are not so many full steps one after the other.
    """
    numbers = [number for number, (_, count) in enumerate(arrivals) if count == batch]
    wanted = numbers[warmup : warmup + steps + 1]
    # A step that brings nothing ends nothing: the next tokens are late by it, and so it counts.
    between = [arrivals[n] for n in range(wanted[0], wanted[-1] + 1) if arrivals[n][1]] if wanted else []
    if len(wanted) < steps + 1 or any(count != batch for _, count in between):
        raise ValueError(f"the batch of {batch} was whole for {len(numbers)} steps, {warmup + steps + 1} are needed")
    times = [arrivals[n][0] for n in wanted]
    before = sum(count for _, count in arrivals[: wanted[0] + 1])
    return [b - a for a, b in itertools.pairwise(times)], before / batch + steps / 2


def prefill_rows(
    engine: MeasuredEngine, points: Sequence[Point], plan: Plan, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure prefill points one after the other, each as plain JSON values."""
    for point in points:
        times = measure_prefill(engine, point, plan)
        report(f"prefill {point}: {times.tokens_per_s / 1e3:.2f}k tok/s")
        yield asdict(times)


def decode_rows(
    engine: MeasuredEngine, points: Sequence[Point], plan: Plan, sampled: bool, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Measure decode points one after the other, each as plain JSON values."""
    for point in points:
        times = measure_decode(engine, point, plan, sampled)
        report(f"decode {point}{' sampled' if sampled else ''}: {times.mean * 1e3:.3f} ms a step")
        yield asdict(times)


def _prompt(rng: random.Random, length: int, plan: Plan) -> tuple[int, ...]:
    return tuple(rng.randrange(plan.vocab_size) for _ in range(length))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
