"""What each door costs: processor time of the gateway for a token that goes out by gRPC and by HTTP.

One service with both doors over simulated workers that have a token for every stream each step, and clients of one door
at a time in a process of their own. Long answers show what a token costs, short ones what a request costs besides.
Processor time and not the clock is counted, so that other work on the machine matters less; the doors are measured in
turn, several times, and the medians are given.

  python -m benchmarks.doors
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.line_process import LineProcess
from benchmarks.report import to_json, write_json
from benchmarks.stream_load import spent_on_streams

_PROCESS = Path(__file__).with_name("doors_process.py")
DOORS = ("grpc", "http")


def measure(door: str, streams: int, length: int, step_s: float, seconds: float) -> dict[str, Any]:
    """One run: tokens, messages, processor seconds of the server, and what follows from them."""
    processes = [server := LineProcess(_PROCESS, str(ROOT), "server", str(streams), str(step_s))]
    try:
        addresses = server.answer()
        client = LineProcess(_PROCESS, str(ROOT), "client", door, addresses[door], str(streams), str(length))
        processes.append(client)
        got = spent_on_streams(server, client, streams, seconds)
    finally:
        for process in processes:
            process.end()
    if got["failures"] or not got["tokens"]:
        raise RuntimeError(f"the run is no good: {got}")
    return {
        **got,
        "cpu_us_per_token": got["cpu_s"] / got["tokens"] * 1e6,
        "tokens_per_message": got["tokens"] / max(1, got["messages"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 16], help="tokens of an answer")
    parser.add_argument("--offered", type=float, default=2000.0, help="tokens a second that the workers have at most")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "doors.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    points = []
    for streams in args.streams:
        for length in args.lengths:
            runs: dict[str, list[dict[str, Any]]] = {door: [] for door in DOORS}
            for _ in range(args.repeats):
                for door in DOORS:
                    runs[door].append(measure(door, streams, length, streams / args.offered, args.seconds))
            medians = {door: statistics.median(run["cpu_us_per_token"] for run in each) for door, each in runs.items()}
            points.append({"streams": streams, "length": length, "cpu_us_per_token": medians, "runs": runs})
            print(
                f"{streams} streams of answers of {length} tokens: gRPC {medians['grpc']:.0f} µs of processor time a "
                f"token, HTTP {medians['http']:.0f}"
            )
    config = {name: getattr(args, name) for name in ("offered", "seconds", "repeats")}
    write_json(args.output, to_json("doors", environment, config, {"points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
