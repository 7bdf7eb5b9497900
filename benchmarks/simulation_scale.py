"""A thousand workers, a million requests, in simulated time, while workers are killed and the pools change their size.

The real engine, queue, router and pools. Every request must succeed or end in a typed error, and memory must not grow
with the number of requests that have been served.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from benchmarks.router_quality import capacity, hardware
from benchmarks.simulation.service import Outcome, Plan, simulate
from benchmarks.simulation.trace import Arrival, arrivals
from benchmarks.simulation.workers import Hardware
from cluster.routing.router import place

SLOWER = 10.0
"""Small workers: with fewer requests a second the same number takes longer, and more is killed meanwhile."""
PROMPT_SCALE, OUTPUT_SCALE = 0.1, 0.06
LOAD = 0.4
KILL_EVERY_S, SCALE_EVERY_S = 2.0, 20.0
_SHARES = (0.1, 0.5, 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a request was lost."""
    parser = argparse.ArgumentParser("simulation_scale", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=1000, metavar="N", help="half of them for prefill")
    parser.add_argument("--requests", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "simulation_scale.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    with _without_warnings():
        result = measure(args.workers, args.requests, args.seed)
    print(
        f"{result['succeeded']} of {args.requests} requests, {result['failures']}, {result['lost']} lost; "
        f"{result['killed']} workers killed, {result['scaled']} times scaled; {result['simulated_s']:.0f} s in "
        f"{result['wall_s']:.0f} s, {result['requests_per_wall_s']:.0f} requests/s; peak MiB {result['peak_rss_mib']}"
    )
    config = {
        "workers": args.workers,
        "requests": args.requests,
        "seed": args.seed,
        "load": LOAD,
        "slower": SLOWER,
        "kill_every_s": KILL_EVERY_S,
        "scale_every_s": SCALE_EVERY_S,
    }
    write_json(args.output, to_json("simulation_scale", environment, config, {"result": result}))
    return 1 if result["lost"] else 0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """That a worker was killed is no news here."""
    log = logging.getLogger("cluster")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def measure(workers: int, requests: int, seed: int) -> dict[str, Any]:
    """One run, as plain figures."""
    pool: list[Hardware] = [replace(hardware(SLOWER), steps_at_once=64)] * (workers // 2)
    scales = {"prompt_scale": PROMPT_SCALE, "output_scale": OUTPUT_SCALE}
    rate = LOAD * len(pool) * capacity(pool[:1], list(arrivals(2000, 1.0, seed, **scales)))
    plan = Plan(
        pool,
        pool,
        kill_every_s=KILL_EVERY_S,
        scale_every_s=SCALE_EVERY_S,
        keep_one_in=max(1, requests // 10_000),
        seed=seed,
    )
    peaks: dict[str, float] = {}
    started = time.monotonic()
    outcome = simulate(plan, _watched(arrivals(requests, rate, seed, **scales), requests, peaks), place)
    return _figures(outcome, requests, time.monotonic() - started) | {"peak_rss_mib": peaks, "offered_per_s": rate}


def _figures(outcome: Outcome, requests: int, wall_s: float) -> dict[str, Any]:
    return {
        "succeeded": outcome.succeeded,
        "failures": dict(outcome.failures),
        "lost": requests - outcome.succeeded - outcome.failures.total(),
        "killed": outcome.killed,
        "scaled": outcome.scaled,
        "preempted": outcome.preempted,
        "ttft_mean_ms": fmean(outcome.ttft_s) * 1e3,
        "ttft_p99_ms": quantiles(outcome.ttft_s, n=100)[98] * 1e3,
        "simulated_s": outcome.seconds,
        "wall_s": wall_s,
        "requests_per_wall_s": requests / wall_s,
    }


def _watched(trace: Iterator[Arrival], requests: int, peaks: dict[str, float]) -> Iterator[Arrival]:
    """The trace; notes how much memory the process has had at most when shares of it have come."""
    marks = {max(1, round(share * requests)): f"{share:.0%}" for share in _SHARES}
    for number, arrival in enumerate(trace, start=1):
        yield arrival
        if name := marks.get(number):
            peaks[name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
