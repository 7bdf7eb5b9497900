"""What the gateway carries: tokens per second of its processor's time, this tree against another in one run.

The real server, engine, queue and router over simulated workers that have a token for every stream each step; clients
in processes of their own. Both trees' servers are there at once and idle; in each round each of them gets a batch of
requests, all at once, and its processor time until the last token is counted (`benchmarks.paired_rounds` says how
the two are compared).

  git worktree add ../before COMMIT
  python -m benchmarks.front_door --before ../before
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answer_slices import Side
from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.line_process import LineProcess
from benchmarks.paired_rounds import in_rounds, ratio
from benchmarks.report import to_json, write_json

_WARM_UP_ROUNDS = 1
_PROCESS = Path(__file__).with_name("front_door_process.py")


def start(pythonpath: str, streams: int, step_s: float, longest: int) -> tuple[Side, str]:
    """The processes of a tree, and the version of grpcio that its server has."""
    server = LineProcess(_PROCESS, pythonpath, "server", str(streams), str(step_s))
    hello = server.answer()
    client = LineProcess(_PROCESS, pythonpath, "client", hello["address"], str(streams), str(longest))
    return Side(server, client), hello["grpcio"]


def compare(before: str, after: str, streams: int, offered: float, longest: int, rounds: int) -> dict[str, Any]:
    """Both trees at so many streams: what a token costs each, and how many more a processor second carries."""
    sides: dict[str, Side] = {}
    versions: dict[str, str] = {}
    try:
        for name, path in (("before", before), ("after", after)):
            sides[name], versions[name] = start(path, streams, streams / offered, longest)
        ways = {name: side.cpu_us_per_token for name, side in sides.items()}
        in_rounds(ways, _WARM_UP_ROUNDS)
        runs = in_rounds(ways, rounds)
    finally:
        for side in sides.values():
            side.end()
    tokens = streams * longest
    return {
        "streams": streams,
        "grpcio": versions,
        "cpu_us_per_token": {name: statistics.median(run) for name, run in runs.items()},
        "more_tokens_per_cpu_s": asdict(ratio(runs["before"], runs["after"])),
        "messages_per_token": {name: statistics.median(side.messages) / tokens for name, side in sides.items()},
        "failures": {name: side.failures for name, side in sides.items()},
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="PATH", help="PYTHONPATH of the tree to compare with")
    parser.add_argument("--after", default=str(ROOT), metavar="PATH", help="PYTHONPATH of the tree to measure")
    parser.add_argument("--streams", type=int, nargs="+", default=[256])
    parser.add_argument("--offered", type=float, default=25_600.0, help="tokens a second that the workers have at most")
    parser.add_argument("--tokens", type=int, default=200, help="of a request")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "front_door.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    points = []
    for streams in args.streams:
        found = compare(args.before, args.after, streams, args.offered, args.tokens, args.rounds)
        points.append(found)
        costs, more = found["cpu_us_per_token"], found["more_tokens_per_cpu_s"]
        print(
            f"{streams} streams: {costs['before']:.1f} → {costs['after']:.1f} µs of CPU a token, "
            f"{more['median']:.2f} × the tokens of a CPU second ({more['low']:.2f} … {more['high']:.2f}), "
            f"failures {found['failures']}"
        )
    config = {name: getattr(args, name) for name in ("offered", "tokens", "rounds")}
    write_json(args.output, to_json("front_door", environment, config, {"points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
