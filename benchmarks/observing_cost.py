"""What it costs to look: the gateway's processor time for each token with metrics, page, log and traces, against none.

The real server, engine, queue and router over simulated workers that have a token for every stream each step; clients
in processes of their own. All ways are there at once and idle; in each round every one of them gets a batch of
requests, and only processor time is counted (`benchmarks.paired_rounds` says how they are compared). Every token is a
message, as where there is time. "nothing" is there twice: what the second one costs more is what the machine makes of
no difference. Simulated workers make no spans of their own, so that traces are the gateway's; they are sent within the
slice that they belong to. What metrics and page do for each token and request is measured by itself, too, and set
against the processor time of a token.

  python -m benchmarks.observing_cost
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.answer_slices import Side
from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.line_process import LineProcess
from benchmarks.observing_calls import call_costs
from benchmarks.observing_cost_process import MODES
from benchmarks.paired_rounds import in_rounds, ratio
from benchmarks.report import to_json, write_json

_WARM_UP_ROUNDS = 2
_LOOK_S = 1.0
_AGAIN = " again"
_SERVER, _CLIENT = (Path(__file__).with_name(f"observing_cost_{name}.py") for name in ("process", "client"))


class _Sink(BaseHTTPRequestHandler):
    """A collector that takes everything and keeps nothing."""

    def do_POST(self) -> None:
        """Take a batch of spans."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def looked_at(page: str) -> Iterator[None]:
    """Ask for all that an open page and a scraper ask for, once a second, until the block ends; empty: for nothing."""
    done = threading.Event()

    def look() -> None:
        while page:
            for path in ("live.json", "metrics"):
                urllib.request.urlopen(page + path, timeout=10).read()
            if done.wait(_LOOK_S):
                break

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


def way(mode: str, streams: int, step_s: float, longest: int, collector: str) -> tuple[Side, Callable[[], float]]:
    """A server that is looked at in one way, and what measures a slice of it."""
    server = LineProcess(
        _SERVER, str(ROOT), mode.removesuffix(_AGAIN), str(streams), str(step_s), collector, silent=True
    )
    hello = server.answer()
    side = Side(server, LineProcess(_CLIENT, str(ROOT), hello["address"], str(streams), str(longest), silent=True))

    def measure() -> float:
        with looked_at(hello["page"]):
            return side.cpu_us_per_token()

    return side, measure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--offered", type=float, default=3200.0, help="tokens a second that the workers have at most")
    parser.add_argument("--tokens", type=int, default=200, help="of a request")
    parser.add_argument("--rounds", type=int, default=25, help="of some 15 seconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "observing_cost.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    sink = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    collector = f"http://127.0.0.1:{sink.server_address[1]}/v1/traces"
    sides: list[Side] = []
    ways: dict[str, Callable[[], float]] = {}
    try:
        for mode in (*MODES, MODES[0] + _AGAIN):
            side, ways[mode] = way(mode, args.streams, args.streams / args.offered, args.tokens, collector)
            sides.append(side)
        in_rounds(ways, _WARM_UP_ROUNDS)
        runs = in_rounds(ways, args.rounds)
    finally:
        for side in sides:
            side.end()
    costs = {mode: statistics.median(run) for mode, run in runs.items()}
    more = {mode: ratio(run, runs["nothing"]) for mode, run in runs.items() if mode != "nothing"}
    print(f"{'nothing':<18} {costs['nothing']:7.1f} µs of CPU a token")
    for mode, found in more.items():
        print(f"{mode:<18} {costs[mode]:7.1f} µs of CPU a token  {found.more()}")
    calls = asyncio.run(_call_costs())
    shares = {name: (token + request / args.tokens) / costs["nothing"] for name, (token, request) in calls.items()}
    for name, (token, request) in calls.items():
        print(f"{name:<18} calls: {token:.2f} µs a token, {request:.1f} µs a request, {shares[name]:.1%} of nothing's")
    config = {name: getattr(args, name) for name in ("streams", "offered", "tokens", "rounds")}
    compared = {mode: asdict(found) for mode, found in more.items()}
    points = {"cpu_us_per_token": costs, "ratio": compared, "calls_us": calls, "calls_share": shares, "runs": runs}
    failures = sum(side.failures for side in sides)
    write_json(args.output, to_json("observing_cost", environment, config, {**points, "failures": failures}))
    return 0


async def _call_costs() -> dict[str, tuple[float, float]]:
    return call_costs()


if __name__ == "__main__":
    sys.exit(main())
