"""What the service does when more comes than it can do: goodput up to twice the rate that saturates it.

The real engine, queue and router over simulated workers of two speeds. Two traces: long prompts, where prefill is the
limit, and long answers, where the decode workers' caches are. Each is run with a bound on the wait and, to see what the
bound is for, without one. A request is good if it succeeds within limits on its time to the first token and on its mean
time between tokens; goodput counts those over the time in which requests came.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from benchmarks.router_quality import hardware
from benchmarks.simulation.service import Plan, simulate
from benchmarks.simulation.trace import Arrival, make_trace
from benchmarks.simulation.workers import Hardware
from cluster.routing.router import place

LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0)
SLOWER = 2.5
MAX_WAIT_S = 2.0
TTFT_S, ITL_S = 5.0, 0.03


@dataclass(frozen=True)
class Workload:
    """Lengths, as multiples of the trace's, and the pools for them.

    Attributes:
        prompt_scale: of the prompts' mean length.
        output_scale: of the answers'.
        prefill: workers.
        decode: workers.
        decode_blocks: of each decode worker's cache.
    """

    prompt_scale: float
    output_scale: float
    prefill: int
    decode: int
    decode_blocks: int

    def pools(self) -> tuple[list[Hardware], list[Hardware]]:
        """A quarter of either is slower."""
        prefill = [hardware(SLOWER if i % 4 == 3 else 1.0) for i in range(self.prefill)]
        decode = [hardware(SLOWER if i % 4 == 3 else 1.0) for i in range(self.decode)]
        return prefill, [replace(worker, num_blocks=self.decode_blocks, steps_at_once=16) for worker in decode]

    def trace(self, requests: int, per_second: float, seed: int) -> list[Arrival]:
        """Requests of these lengths."""
        scales = {"prompt_scale": self.prompt_scale, "output_scale": self.output_scale}
        return make_trace(requests, per_second, seed, **scales)


WORKLOADS: Mapping[str, Workload] = {
    "long prompts": Workload(1.0, 1.0, prefill=8, decode=4, decode_blocks=8192),
    "long answers": Workload(0.1, 2.0, prefill=8, decode=4, decode_blocks=1024),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("saturation", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=4000, metavar="N", help="at the saturating rate")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, metavar="X", help="of the saturating rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "saturation.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    cases = []
    for name, workload in WORKLOADS.items():
        rate = saturating_rate(workload, args.requests, args.seed)
        print(f"{name}: saturated by {rate:.2f} requests/s")
        for bound in (MAX_WAIT_S, math.inf):
            for load in args.loads:
                case = measure(workload, load, rate, round(args.requests * load), bound, args.seed)
                cases.append({"workload": name, **case})
                print(_line(cases[-1]))
    limits = {"max_queue_wait_s": MAX_WAIT_S, "ttft_s": TTFT_S, "itl_s": ITL_S}
    config = {"requests": args.requests, "seed": args.seed, "slower": SLOWER, **limits}
    write_json(args.output, to_json("saturation", environment, config, {"cases": cases}))
    return 0


def saturating_rate(workload: Workload, requests: int, seed: int) -> float:
    """Requests a second that end while nobody ever waits for work: all come at once; those in the middle count."""
    prefill, decode = workload.pools()
    outcome = simulate(Plan(prefill, decode, timeout_s=1e6), workload.trace(requests, 1e9, seed), place)
    first, last = requests // 2, requests * 4 // 5
    return (last - first) / (outcome.ended_s[last] - outcome.ended_s[first])


def measure(
    workload: Workload, load: float, rate: float, requests: int, max_wait_s: float, seed: int
) -> dict[str, Any]:
    """One load; `rate` is the saturating one."""
    prefill, decode = workload.pools()
    trace = workload.trace(requests, load * rate, seed)
    plan = Plan(prefill, decode, timeout_s=60.0, max_queue_wait_s=max_wait_s)
    outcome = simulate(plan, trace, place)
    return {
        "max_queue_wait_s": max_wait_s if math.isfinite(max_wait_s) else None,
        "load": load,
        "offered_per_s": load * rate,
        "requests": requests,
        "goodput_per_s": outcome.good(TTFT_S, ITL_S) / trace[-1].at_s,
        "succeeded": outcome.succeeded,
        "failures": dict(outcome.failures),
        "preempted": outcome.preempted,
        "ttft_p99_ms": _p99_ms(outcome.ttft_s),
        "itl_p99_ms": _p99_ms(outcome.itl_s),
    }


def _p99_ms(seconds: Sequence[float]) -> float | None:
    return quantiles(seconds, n=100)[98] * 1e3 if len(seconds) > 1 else None


def _line(case: Mapping[str, Any]) -> str:
    bound = case["max_queue_wait_s"]
    return (
        f"  {case['load']:.2f} ×, {'no bound' if bound is None else f'at most {bound:g} s'}: "
        f"{case['goodput_per_s']:.2f} good/s, {case['succeeded']} of {case['requests']}, TTFT p99 "
        f"{case['ttft_p99_ms'] or 0:.0f} ms, {case['preempted']} preempted, {case['failures']}"
    )


if __name__ == "__main__":
    sys.exit(main())
