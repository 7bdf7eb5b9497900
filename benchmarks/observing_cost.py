"""What it costs to look: the gateway's processor time for each token with metrics, page, log and traces, against none.

The real server, engine, queue and router over simulated workers that have a token for every stream each step; clients
in a process of their own. One server is looked at in one way after the other, in slices of about a second, in an order
that is drawn anew each round, each slice a batch of whole requests; only processor time is counted. So the ways differ
in nothing else, and what else the machine does meets all of them alike (`benchmarks.paired_rounds` says how they are
compared). Every token is a message, as where there is time. "nothing" is there twice: its mean of a round is what the
others are compared with, and what the second one costs more than the first is what the machine makes of no difference.
Simulated workers make no spans of their own, so that traces are the gateway's; they are sent within the slice that they
belong to. What observers do for each token and request is measured by itself, too, and set against the processor time
of a token.

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.line_process import LineProcess
from benchmarks.observing_calls import call_costs, trace_cost
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
        wait_s = _LOOK_S / 2  # so that a slice has as many looks as it has seconds
        while page and not done.wait(wait_s):
            for path in ("live.json", "metrics"):
                urllib.request.urlopen(page + path, timeout=10).read()
            wait_s = _LOOK_S

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


class Slices:
    """One server with its clients, looked at in one way or another.

    Args:
        streams: answers of a slice, all at once.
        step_s: seconds of a step of the decode worker, in which every stream has a token.
        longest: tokens of an answer.
        collector: where traces are sent.

    Attributes:
        failures: requests that failed, of all slices.
        messages: that were received, of all slices.
        tokens: likewise.
    """

    def __init__(self, streams: int, step_s: float, longest: int, collector: str) -> None:
        self._server = LineProcess(_SERVER, str(ROOT), str(streams), str(step_s), collector, silent=True)
        address = self._server.answer()["address"]
        self._client = LineProcess(_CLIENT, str(ROOT), address, str(streams), str(longest), silent=True)
        self.failures = self.messages = self.tokens = 0

    def cpu_us_per_token(self, mode: str) -> float:
        """A slice in this way: microseconds of the server's processor time for each token."""
        before = self._server.ask(mode.removesuffix(_AGAIN))
        with looked_at(before["page"]):
            got = self._client.ask()
        spent = self._server.ask()["cpu_s"] - before["cpu_s"]
        self.failures += got["failures"]
        self.messages += got["messages"]
        self.tokens += got["tokens"]
        return float(spent / got["tokens"] * 1e6)

    def end(self) -> None:
        """Kill both."""
        self._client.end()
        self._server.end()


def measured(args: argparse.Namespace, collector: str) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Every way in every round, and what came of all requests."""
    runs: dict[str, list[float]] = {mode: [] for mode in (MODES[0], *args.ways, MODES[0] + _AGAIN)}
    counts = {"failures": 0, "messages": 0, "tokens": 0}
    for start in range(args.starts):
        slices = Slices(args.streams, args.streams / args.offered, args.tokens, collector)
        try:
            ways = {mode: partial(slices.cpu_us_per_token, mode) for mode in runs}
            in_rounds(ways, _WARM_UP_ROUNDS)
            for mode, run in in_rounds(ways, args.rounds, seed=start).items():
                runs[mode] += run
            for name in counts:
                counts[name] += getattr(slices, name)
        finally:
            slices.end()
    return runs, counts


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=MODES[1:], default=MODES[1:], help="to look; default: all")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--offered", type=float, default=6400.0, help="tokens a second that the workers have at most")
    parser.add_argument("--tokens", type=int, default=200, help="of a request")
    parser.add_argument("--rounds", type=int, default=20, help="of each start, some 8 seconds each")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "observing_cost.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    sink = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    collector = f"http://127.0.0.1:{sink.server_address[1]}/v1/traces"
    runs, counts = measured(args, collector)
    costs = {mode: statistics.median(run) for mode, run in runs.items()}
    nothing = [(one + other) / 2 for one, other in zip(runs[MODES[0]], runs[MODES[0] + _AGAIN], strict=True)]
    base = {mode: runs[MODES[0]] if mode == MODES[0] + _AGAIN else nothing for mode in runs}
    more = {mode: ratio(run, base[mode]) for mode, run in runs.items() if mode != MODES[0]}
    print(f"{'nothing':<18} {costs['nothing']:7.1f} µs of CPU a token")
    for mode, found in more.items():
        print(f"{mode:<18} {costs[mode]:7.1f} µs of CPU a token  {found.more()}")
    calls = asyncio.run(_call_costs(collector))
    shares = {name: (token + request / args.tokens) / costs["nothing"] for name, (token, request) in calls.items()}
    for name, (token, request) in calls.items():
        print(f"{name:<18} calls: {token:.2f} µs a token, {request:.1f} µs a request, {shares[name]:.1%} of nothing's")
    config = {name: getattr(args, name) for name in ("ways", "streams", "offered", "tokens", "rounds", "starts")}
    compared = {mode: asdict(found) for mode, found in more.items()}
    points = {"cpu_us_per_token": costs, "ratio": compared, "calls_us": calls, "calls_share": shares, "runs": runs}
    write_json(args.output, to_json("observing_cost", environment, config, {**points, **counts}))
    return 0


async def _call_costs(collector: str) -> dict[str, tuple[float, float]]:
    return call_costs() | {"traces": (0.0, await trace_cost(collector))}


if __name__ == "__main__":
    sys.exit(main())
