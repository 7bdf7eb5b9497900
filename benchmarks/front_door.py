"""What the gateway carries: tokens per second of its processor's time, this tree against another in one run.

The real server, engine, queue and router over workers that only say tokens (`benchmarks.front_door_process`); clients
in processes of their own. Both trees' servers are there at once with all of their streams open, and the load goes from
one to the other in slices of about a second, in an order that is drawn anew each round; processor time alone is
counted. So what else the machine does, and what its clock does, meets both alike (`benchmarks.paired_rounds` says how
they are compared). After some rounds both start anew, since where a process happens to lie in memory makes a few per
cent, too. Every token is a message, unless `--merging` lets this tree have tokens go together when its loop is late.
A third server is bare: grpc.aio's, which writes prepared bytes (`benchmarks.bare_door_process`), for what of a token is
gRPC's own. A burst of calls, all at once, tells how they are answered.

  git worktree add ../before COMMIT
  python -m benchmarks.front_door --before ../before
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.paired_rounds import in_rounds, ratio
from benchmarks.report import to_json, write_json
from benchmarks.stream_slices import StreamSide, ends_of_a_burst

_WARM_UP_SLICES = 2


def compare(trees: dict[str, str], streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both trees at so many streams: what a token costs each, and how many more a processor second carries."""
    step_s = streams / args.offered
    steps = max(2, round(args.slice / step_s))
    places = {**trees, "bare": str(ROOT)}
    runs: dict[str, list[float]] = {name: [] for name in places}
    versions: dict[str, str] = {}
    tokens, messages, failures = (dict.fromkeys(places, 0) for _ in range(3))
    for start in range(args.starts):
        sides: dict[str, StreamSide] = {}
        try:
            for name, path in places.items():
                how = {"merging": args.merging, "bare": name == "bare"}
                sides[name] = StreamSide(path, streams, step_s, args.tokens, **how)
                sides[name].begin()
            ways = {name: partial(side.cpu_us_per_token, steps) for name, side in sides.items()}
            in_rounds(ways, _WARM_UP_SLICES)
            for name, run in in_rounds(ways, args.rounds, seed=start).items():
                runs[name] += run
            for name, side in sides.items():
                versions[name] = side.grpcio
                tokens[name] += sum(side.tokens[_WARM_UP_SLICES:])
                messages[name] += sum(side.messages[_WARM_UP_SLICES:])
                failures[name] += side.failures
        finally:
            for side in sides.values():
                side.end()
    return {
        "streams": streams,
        "grpcio": versions,
        "cpu_us_per_token": {name: statistics.median(run) for name, run in runs.items()},
        "more_tokens_per_cpu_s": asdict(ratio(runs["before"], runs["after"])),
        "bare_share": {name: asdict(ratio(runs["bare"], runs[name])) for name in trees},
        "messages_per_token": {name: messages[name] / tokens[name] for name in places},
        "failures": failures,
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="PATH", help="PYTHONPATH of the tree to compare with")
    parser.add_argument("--after", default=str(ROOT), metavar="PATH", help="PYTHONPATH of the tree to measure")
    parser.add_argument("--streams", type=int, nargs="*", default=[256, 2000])
    parser.add_argument("--offered", type=float, default=5000.0, help="tokens a second that the workers have")
    parser.add_argument("--tokens", type=int, default=200, help="of a request")
    parser.add_argument("--slice", type=float, default=1.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=12, help="of each start")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--merging", action="store_true", help="tokens may go together when the loop is late")
    parser.add_argument("--burst", type=int, default=4000, help="simultaneous calls; 0: none")
    parser.add_argument("--queue", type=int, default=1000, help="calls of a burst that may wait")
    parser.add_argument("--output", type=Path, default=RESULTS / "front_door.json")
    args = parser.parse_args(argv)
    for tree in (args.before, args.after):  # else Python would find what is installed, and compare that with itself
        if not (Path(tree) / "cluster").is_dir():
            parser.error(f"{tree} is no tree of Baton")
    environment = Environment.capture(None)
    trees, points = {"before": args.before, "after": args.after}, []
    for streams in args.streams:
        found = compare(trees, streams, args)
        points.append(found)
        costs, more, each = found["cpu_us_per_token"], found["more_tokens_per_cpu_s"], found["messages_per_token"]
        print(
            f"{streams} streams: {costs['before']:.1f} → {costs['after']:.1f} µs of CPU a token, "
            f"{more['median']:.2f} × the tokens of a CPU second ({more['low']:.2f} … {more['high']:.2f}), "
            f"a bare server {costs['bare']:.1f} µs a message; "
            f"{each['before']:.3f} and {each['after']:.3f} messages a token, failures {found['failures']}"
        )
    bursts = {name: ends_of_a_burst(path, args.burst, args.queue) for name, path in trees.items() if args.burst}
    for name, ends in bursts.items():
        print(f"{args.burst} calls at once, {name}: {ends}")
    names = ("offered", "tokens", "slice", "rounds", "starts", "merging", "burst", "queue")
    config = {name: getattr(args, name) for name in names}
    write_json(args.output, to_json("front_door", environment, config, {"points": points, "bursts": bursts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
