"""What it costs to look: the gateway's processor time for each token with metrics, page, log and traces, against none.

The real server, engine, queue and router over simulated workers that have a token for every stream each step; clients
in a process of their own. The ways are measured in turn, several times, in slices of a second, and the lower quartiles
of the slices compared: what else the machine does makes processor time longer, never shorter. Simulated workers make no
spans of their own, so that traces are the gateway's. What metrics and page do for each token and request is measured by
itself, too, and set against the processor time of a token: that tells hundredths where the machine is not quiet.

  python -m benchmarks.observing_cost
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.line_process import LineProcess
from benchmarks.observing_calls import call_costs
from benchmarks.observing_cost_process import MODES
from benchmarks.report import to_json, write_json

_WARM_UP_S = 2.0
_SLICE_S = 1.0
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


def measure(mode: str, streams: int, step_s: float, longest: int, seconds: float, collector: str) -> list[float]:
    """One run: microseconds of the server's processor time for each token, in slices of a second."""
    arguments = (mode, str(streams), str(step_s), collector)
    processes = [server := LineProcess(_SERVER, str(ROOT), *arguments, silent=True)]
    slices: list[float] = []
    try:
        hello = server.answer()
        load = (hello["address"], str(streams), str(longest))
        processes.append(client := LineProcess(_CLIENT, str(ROOT), *load, silent=True))
        time.sleep(_WARM_UP_S)
        cpu_s, tokens = server.ask()["cpu_s"], client.ask()["tokens"]
        for _ in range(int(seconds / _SLICE_S)):
            if hello["page"]:  # an open page asks once a second, and so does this scraper
                for path in ("live.json", "metrics"):
                    urllib.request.urlopen(hello["page"] + path, timeout=10).read()
            time.sleep(_SLICE_S)
            cpu_now, tokens_now = server.ask()["cpu_s"], client.ask()["tokens"]
            if tokens_now > tokens:
                slices.append((cpu_now - cpu_s) / (tokens_now - tokens) * 1e6)
            cpu_s, tokens = cpu_now, tokens_now
    finally:
        for process in processes:
            process.end()
    return slices


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--offered", type=float, default=1600.0, help="tokens a second that the workers have at most")
    parser.add_argument("--tokens", type=int, default=200, help="of a request")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "observing_cost.json")
    args = parser.parse_args(argv)
    environment = Environment.capture(None)
    sink = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    collector = f"http://127.0.0.1:{sink.server_address[1]}/v1/traces"
    runs: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for _ in range(args.repeats):
        for mode in MODES:
            step_s = args.streams / args.offered
            runs[mode].append(measure(mode, args.streams, step_s, args.tokens, args.seconds, collector))
    costs = {mode: _lower_quartile([cost for run in each for cost in run]) for mode, each in runs.items()}
    more = {mode: cost / costs["nothing"] - 1.0 for mode, cost in costs.items()}
    for mode, cost in costs.items():
        print(f"{mode:<18} {cost:7.1f} µs of CPU a token  {more[mode]:+.1%}")
    calls = asyncio.run(_call_costs())
    shares = {name: (token + request / args.tokens) / costs["nothing"] for name, (token, request) in calls.items()}
    for name, (token, request) in calls.items():
        print(f"{name:<18} calls: {token:.2f} µs a token, {request:.1f} µs a request, {shares[name]:.1%} of nothing's")
    config = {name: getattr(args, name) for name in ("streams", "offered", "tokens", "seconds", "repeats")}
    points = {"cpu_us_per_token": costs, "more": more, "calls_us": calls, "calls_share": shares, "runs": runs}
    write_json(args.output, to_json("observing_cost", environment, config, points))
    return 0


async def _call_costs() -> dict[str, tuple[float, float]]:
    return call_costs()


def _lower_quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


if __name__ == "__main__":
    sys.exit(main())
