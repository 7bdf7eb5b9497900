"""What the gateway carries: tokens per second of its processor's time, this tree against another in one run.

The real server, engine, queue and router over simulated workers that have a token for every stream each step; clients
in processes of their own. Processor time and not the clock is counted, so that other work on the machine matters less;
the two trees are measured in turn, several times, and the medians compared.

  git worktree add ../before COMMIT
  python -m benchmarks.front_door --before ../before
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

_PROCESS = Path(__file__).with_name("front_door_process.py")


def measure(pythonpath: str, streams: int, step_s: float, seconds: float) -> dict[str, Any]:
    """One run: tokens, messages, processor seconds of the server, and what follows from them."""
    processes = [server := LineProcess(_PROCESS, pythonpath, "server", str(streams), str(step_s))]
    try:
        hello = server.answer()
        processes.append(client := LineProcess(_PROCESS, pythonpath, "client", hello["address"], str(streams)))
        got = spent_on_streams(server, client, streams, seconds)
    finally:
        for process in processes:
            process.end()
    return {
        "grpcio": hello["grpcio"],
        **got,
        "tokens_per_cpu_s": got["tokens"] / got["cpu_s"],
        "cpu_us_per_token": got["cpu_s"] / got["tokens"] * 1e6,
        "tokens_per_message": got["tokens"] / max(1, got["messages"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="PATH", help="PYTHONPATH of the tree to compare with")
    parser.add_argument("--after", default=str(ROOT), metavar="PATH", help="PYTHONPATH of the tree to measure")
    parser.add_argument("--streams", type=int, nargs="+", default=[256])
    parser.add_argument("--offered", type=float, default=25_600.0, help="tokens a second that the workers have at most")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "front_door.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    points = []
    for streams in args.streams:
        runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        for _ in range(args.repeats):
            for name, path in (("before", args.before), ("after", args.after)):
                runs[name].append(measure(path, streams, streams / args.offered, args.seconds))
        medians = {name: statistics.median(run["tokens_per_cpu_s"] for run in each) for name, each in runs.items()}
        ratio = medians["after"] / medians["before"]
        points.append({"streams": streams, "tokens_per_cpu_s": medians, "ratio": ratio, "runs": runs})
        print(
            f"{streams} streams: {medians['before']:.0f} → {medians['after']:.0f} tokens per CPU second, {ratio:.2f} ×"
        )
    config = {name: getattr(args, name) for name in ("offered", "seconds", "repeats")}
    write_json(args.output, to_json("front_door", environment, config, {"points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
