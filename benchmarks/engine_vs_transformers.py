"""The engine alone against `transformers` generate: same model, dtype and threads, side by side in one run.

    python -m benchmarks.engine_vs_transformers

Both run the same jobs, greedily, in turns, so that whatever else the machine does hits both; medians are reported and
the tokens are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.distributions import Uniform
from benchmarks.engine_alone import BatchRun, EngineAlone, Job
from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from benchmarks.synthetic_model import SHAPE, save_checkpoint
from benchmarks.transformers_generate import TransformersGenerate

_VOCAB = 32000
_EXACT = "float32"
_QUIET_SPREAD = 0.25


class Contestant(Protocol):
    """Runs jobs to their ends."""

    def run(self, jobs: Sequence[Job]) -> BatchRun:
        """Run some jobs that begin together."""
        ...


@dataclass(frozen=True)
class Case:
    """Jobs that begin together, and how many times as fast as `transformers` their decoding should be."""

    name: str
    jobs: tuple[Job, ...]
    target: float

    @property
    def decoded_tokens(self) -> int:
        """Tokens that are wanted, less the first of each job, which prefill makes."""
        return sum(job.max_tokens - 1 for job in self.jobs)


@dataclass(frozen=True)
class Measurement:
    """One contestant's runs of one case, in the order in which they were made. Tokens are those that were wanted."""

    decode_tokens_per_s: tuple[float, ...]
    total_tokens_per_s: tuple[float, ...]

    @property
    def decode(self) -> float:
        """Median decode tokens per second."""
        return statistics.median(self.decode_tokens_per_s)

    @property
    def total(self) -> float:
        """Median output tokens per second from the beginning, prefill included."""
        return statistics.median(self.total_tokens_per_s)

    @property
    def spread(self) -> float:
        """Fastest less slowest decoding, as a share of the median: what the machine's other work did."""
        return (max(self.decode_tokens_per_s) - min(self.decode_tokens_per_s)) / self.decode

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        medians = {"decode_median": self.decode, "total_median": self.total, "decode_spread": self.spread}
        return {**asdict(self), **medians}


@dataclass(frozen=True)
class Comparison:
    """A case in one dtype, measured on both sides.

    Attributes:
        equal_jobs: how many jobs got the same tokens from both. In less than float32 rounding decides near ties, so
            that less than all is no error there.
    """

    case: Case
    dtype: str
    engine: Measurement
    transformers: Measurement
    equal_jobs: int

    @property
    def decode_ratio(self) -> float:
        """How many times as many decode tokens per second the engine makes."""
        return self.engine.decode / self.transformers.decode

    @property
    def total_ratio(self) -> float:
        """The same, end to end."""
        return self.engine.total / self.transformers.total

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "case": self.case.name,
            "dtype": self.dtype,
            "jobs": [{"prompt_tokens": len(job.prompt), "output_tokens": job.max_tokens} for job in self.case.jobs],
            "engine": self.engine.to_json(),
            "transformers": self.transformers.to_json(),
            "decode_ratio": self.decode_ratio,
            "total_ratio": self.total_ratio,
            "target": self.case.target,
            "target_met": self.decode_ratio >= self.case.target,
            "equal_jobs": self.equal_jobs,
        }


def make_cases(seed: int, vocab_size: int = _VOCAB) -> tuple[Case, ...]:
    """One sequence; and eight of mixed lengths, as requests of a service are."""
    rng = random.Random(seed)
    prompts, outputs = Uniform(16, 256), Uniform(16, 128)

    def job(prompt_tokens: int, output_tokens: int) -> Job:
        return Job(tuple(rng.randrange(vocab_size) for _ in range(prompt_tokens)), output_tokens)

    return (
        Case("batch 1", (job(128, 64),), 1.0),
        Case("batch 8, mixed lengths", tuple(job(prompts.sample(rng), outputs.sample(rng)) for _ in range(8)), 1.5),
    )


def compare(case: Case, dtype: str, engine: Contestant, other: Contestant, repeats: int) -> Comparison:
    """Run a case on both, `repeats` times in turns, after one run that is not timed but whose tokens are compared."""
    expected, got = other.run(case.jobs), engine.run(case.jobs)
    runs: dict[str, list[BatchRun]] = {"engine": [], "other": []}
    for repeat in range(repeats):
        order = [("engine", engine), ("other", other)]
        for name, contestant in order if repeat % 2 == 0 else reversed(order):
            runs[name].append(contestant.run(case.jobs))
    return Comparison(
        case,
        dtype,
        _measurement(case, runs["engine"]),
        _measurement(case, runs["other"]),
        sum(a == b for a, b in zip(expected.tokens, got.tokens, strict=True)),
    )


def _measurement(case: Case, runs: Sequence[BatchRun]) -> Measurement:
    total = case.decoded_tokens + len(case.jobs)
    return Measurement(
        tuple(case.decoded_tokens / run.decode_s for run in runs), tuple(total / run.total_s for run in runs)
    )


def _measure_all(args: argparse.Namespace, checkpoint: Path) -> list[Comparison]:
    comparisons = []
    for dtype in args.dtype:
        engine, other = EngineAlone(checkpoint, dtype=dtype), TransformersGenerate(checkpoint, dtype=dtype)
        for case in make_cases(args.seed):
            print(f"{dtype}, {case.name}: {args.repeats} times on each side", file=sys.stderr)
            comparisons.append(compare(case, dtype, engine, other, args.repeats))
    return comparisons


def _print(comparisons: Sequence[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("dtype", "case", title="Tokens per second, medians", title_justify="left")
    columns = ("engine decode", "transformers decode", "ratio", "target", "engine total", "transformers total", "ratio")
    for name in (*columns, "same tokens"):
        table.add_column(name, justify="right")
    for c in comparisons:
        table.add_row(
            c.dtype,
            c.case.name,
            f"{c.engine.decode:.1f}",
            f"{c.transformers.decode:.1f}",
            f"{c.decode_ratio:.2f}×",
            f"{c.case.target:.1f}×",
            f"{c.engine.total:.1f}",
            f"{c.transformers.total:.1f}",
            f"{c.total_ratio:.2f}×",
            f"{c.equal_jobs} of {len(c.case.jobs)}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """What is not as it should be: other tokens in float32, a target that was missed."""
    wrong = []
    for c in comparisons:
        if c.dtype == _EXACT and c.equal_jobs < len(c.case.jobs):
            wrong.append(f"{c.dtype}, {c.case.name}: {len(c.case.jobs) - c.equal_jobs} jobs got other tokens")
        if c.decode_ratio < c.case.target:
            wrong.append(f"{c.dtype}, {c.case.name}: {c.decode_ratio:.2f} times as fast, target {c.case.target}")
    return wrong


def noise(comparisons: Sequence[Comparison]) -> list[str]:
    """Where runs differ so much from each other that the machine cannot have been quiet."""
    return [
        f"{c.dtype}, {c.case.name}: runs of {name} differ by {side.spread:.0%}; repeat on a quiet machine"
        for c in comparisons
        for name, side in (("the engine", c.engine), ("transformers", c.transformers))
        if side.spread > _QUIET_SPREAD
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: 1 if tokens differ in float32, or a target was missed."""
    parser = argparse.ArgumentParser("engine_vs_transformers", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of both (default: 2)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, prompts and lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "engine_vs_transformers.json", metavar="FILE")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    environment = Environment.capture(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_checkpoint(Path(folder), args.seed)
        comparisons = _measure_all(args, Path(folder))
    _print(comparisons)
    config = {"model": {**SHAPE, "parameters": parameters}, "repeats": args.repeats, "seed": args.seed}
    results = {"comparisons": [comparison.to_json() for comparison in comparisons]}
    write_json(args.output, to_json("engine_vs_transformers", environment, config, results))
    wrong = verdicts(comparisons)
    for line in (*noise(comparisons), *wrong):
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
