"""Two commits of Baton on one GPU, in turns: how much slower or faster each point of the engine has become.

    python -m benchmarks.gpu_commits --before DIR --after DIR

Each folder is a checkout. `benchmarks.gpu_engine` of each runs in a process of its own, one after the other, before and
after by turns, so that neither has the card in a state that the other has not. A point's ratio is that of the medians
over all rounds; above 1 the later commit is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json

SIDES = ("before", "after")


def run_engine(checkout: Path, arguments: Sequence[str], output: Path, timeout_s: float) -> Mapping[str, Any] | None:
    """The results of `benchmarks.gpu_engine` of a checkout; None: it did not end well, and its log says why."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.gpu_engine", "--output", str(output.resolve()), *arguments]
    try:
        subprocess.run(command, cwd=checkout, env=environment, check=True, timeout=timeout_s)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"gpu_commits: {checkout}: {error}", file=sys.stderr)
    if not output.exists():
        return None
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return content


def seconds_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each point of a run: of a whole prefill batch, or of one decode step."""
    prefill = {f"prefill {row['point']}": statistics.median(row["seconds"]) for row in results["prefill"]}
    decode = {f"decode {row['point']}{' sampled' * row['sampled']}": row["mean"] for row in results["decode"]}
    return {**prefill, **decode}


def compare(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One row a point that both sides have measured: the medians over rounds, and their ratio.

    Args:
        rounds: by side, the seconds of each round's points.
    """
    points = dict.fromkeys(point for run in rounds["before"] for point in run)
    rows = []
    for point in points:
        seconds = {side: [run[point] for run in rounds[side] if point in run] for side in SIDES}
        if all(seconds.values()):
            medians = {side: statistics.median(seconds[side]) for side in SIDES}
            rows.append({"point": point, **seconds, "ratio": medians["after"] / medians["before"]})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; what follows `--` goes to `benchmarks.gpu_engine`."""
    parser = argparse.ArgumentParser("gpu_commits", description=__doc__.splitlines()[0] if __doc__ else "")
    for side in SIDES:
        parser.add_argument(f"--{side}", type=Path, required=True, metavar="DIR", help="a checkout")
        parser.add_argument(f"--{side}-name", required=True, metavar="COMMIT", help="what it is called in the results")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of each side (default: 2)")
    parser.add_argument("--timeout-s", type=float, default=240.0, metavar="S", help="of one round of one side")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_commits.json", metavar="FILE")
    parser.add_argument("engine", nargs="*", metavar="-- ARGUMENT", help="for benchmarks.gpu_engine")
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    config = {side: vars(args)[f"{side}_name"] for side in SIDES} | {"engine": args.engine, "gpu_names": gpu_names()}
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                output = Path(scratch) / f"{side}-{number}.json"
                results = run_engine(getattr(args, side).resolve(), args.engine, output, args.timeout_s)
                if results is not None:
                    rounds[side].append(seconds_of(results))
                write_json(args.output, to_json("gpu_commits", environment, config, {"points": compare(rounds)}))
    for row in compare(rounds):
        print(f"{row['point']:24} {row['ratio']:.3f}")
    return 0 if all(rounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
