"""How much the router's choice is worth: one trace, the real engine, simulated workers of two speeds, some policies.

Every policy sees the same requests at the same times on the same workers; where prompts are never computed on prefill
workers, these decode, too. Half of all tokens are in prompts that begin like others; the workers are on two hosts, and
between those KV cache moves more slowly. The load is given as a share of what the prefill pool could compute if it
never waited and nothing was cached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from benchmarks.simulation.policies import POLICIES
from benchmarks.simulation.service import Outcome, Plan, simulate
from benchmarks.simulation.trace import Arrival, make_trace
from benchmarks.simulation.workers import Hardware
from workers.runner.step_times import StepTimes

PREFILL_S = ((32, 0.006), (128, 0.0065), (512, 0.014), (2048, 0.045), (8192, 0.2), (16384, 0.45), (131072, 9.0))
DECODE_S = ((1, 0.0045), (16, 0.0049), (64, 0.0053), (256, 0.0092))
KV_TOKEN_S = 131_072 / 4e12
"""About an H200 with a model of eight billion parameters: 128 KiB of keys and values a token, read at 4 TB/s."""
SLOWER = 2.5
SHARED = 0.5
NETWORK_BYTES_PER_S = 25e9
CASES = (
    ("predicted time", "always"),
    ("predicted time", "auto"),
    ("predicted time", "never"),
    ("least loaded", "always"),
    ("round robin", "always"),
)
"""Policies, and where prompts may be computed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("router_quality", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=4000, metavar="N")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.85], metavar="X", help="of capacity")
    parser.add_argument("--fast", type=int, default=4, metavar="N", help="fast workers in each pool")
    parser.add_argument("--slow", type=int, default=4, metavar="N", help=f"workers {SLOWER} times slower in each pool")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "router_quality.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    pool = [
        replace(hardware(SLOWER if slow else 1.0), host=f"host-{number % 2}", network_bytes_per_s=NETWORK_BYTES_PER_S)
        for slow, count in ((False, args.fast), (True, args.slow))
        for number in range(count)
    ]
    cases = []
    for load in args.loads:
        rate = load * capacity(pool, make_trace(args.requests, 1.0, args.seed))
        trace = make_trace(args.requests, rate, args.seed, shared=SHARED)
        for name, disaggregation in CASES:
            plan = Plan(pool, pool, disaggregation=disaggregation)
            if disaggregation == "never":
                plan = replace(plan, prefill=[], decode=[*pool, *pool])
            case = {"load": load, "policy": name, "disaggregation": disaggregation}
            case |= summary(simulate(plan, trace, POLICIES[name]()))
            print(
                f"load {load:.0%}, {name}, disaggregation {disaggregation}: TTFT mean {case['ttft_mean_ms']:.0f} "
                f"p99 {case['ttft_p99_ms']:.0f} ms, ITL mean {case['itl_mean_ms']:.2f} p99 {case['itl_p99_ms']:.2f} ms"
            )
            cases.append(case)
    config = {"requests": args.requests, "fast": args.fast, "slow": args.slow, "slower": SLOWER, "seed": args.seed}
    config |= {"shared": SHARED, "network_bytes_per_s": NETWORK_BYTES_PER_S}
    write_json(args.output, to_json("router_quality", environment, config, {"cases": cases}))
    return 0


def capacity(pool: Sequence[Hardware], trace: Sequence[Arrival]) -> float:
    """Requests a second that the pool's prefill workers could compute, each at its own pace."""
    return sum(1.0 / fmean(w.step_times.prefill_seconds(a.prompt_tokens) for a in trace) for w in pool)


def summary(outcome: Outcome) -> dict[str, Any]:
    """Milliseconds of an outcome."""
    return {
        "succeeded": len(outcome.ttft_s),
        "failures": dict(outcome.failures),
        "ttft_mean_ms": fmean(outcome.ttft_s) * 1e3,
        "ttft_p99_ms": quantiles(outcome.ttft_s, n=100)[98] * 1e3,
        "itl_mean_ms": fmean(outcome.itl_s) * 1e3,
        "itl_p99_ms": quantiles(outcome.itl_s, n=100)[98] * 1e3,
    }


def hardware(slower: float) -> Hardware:
    """About an H200 with a model of eight billion parameters, so many times slower."""
    prefill, decode = (tuple((n, s * slower) for n, s in points) for points in (PREFILL_S, DECODE_S))
    step_times = StepTimes(prefill, decode, KV_TOKEN_S * slower)
    return replace(Hardware(step_times), link_bytes_per_s=250e9 / slower)


if __name__ == "__main__":
    sys.exit(main())
