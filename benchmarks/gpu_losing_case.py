"""Where disaggregation loses: two GPUs as 1P1D, and as two workers that do both, with the same requests.

    python -m benchmarks.gpu_losing_case --devices 0,1

Starts `baton up` either way, with the shape of Llama-3.1-8B and random weights in bfloat16. First short requests at a
low rate, where neither GPU has much to do; then requests that are nearly all decode, for which one GPU decodes on one
side and two on the other: the goodput of either. Ends by itself when its time is up.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.client_processes import ClientProcesses
from benchmarks.environment import RESULTS, Environment
from benchmarks.gpu_handoff import kernel_caches
from benchmarks.gpu_pool_ratio import (
    config_of,
    lead_of,
    measured_fleet,
    objective_of,
    plan_to_json,
    plans_of,
    standing_of,
)
from benchmarks.model_shapes import model_folder
from benchmarks.report import to_json, write_json
from benchmarks.running_pools import RunningPools, Window, add_arguments, parse_asked, running_pools, time_for
from benchmarks.service_points import Load, measure_load
from cluster.planning.terms import Split
from workers.errors import BatonError

PAIR, MIXED = Split(1, 1), Split(0, 2)
SETTINGS = {
    PAIR: {"router.disaggregation": "always", "prefill.replicas": 1, "decode.replicas": 1},
    MIXED: {
        "router.disaggregation": "never",
        "prefill.replicas": 0,
        "prefill.min_replicas": 0,
        "decode.replicas": 2,
    },
}
LOW, ASKED = "4:128:128:10", "decode-bound:128:512:500:6.5"
_STOP_S = 8.0
_NO_GUESS = 0.5


async def measure_side(
    pools: RunningPools,
    split: Split,
    args: argparse.Namespace,
    until: float,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """The low load, then the goodput, on a service that is up; `found` is filled as it goes."""

    def report(line: str) -> None:
        print(f"{split} {line}", file=sys.stderr, flush=True)
        save()

    found["start_s"], found["workers"] = pools.start_s, [asdict(worker) for worker in pools.workers]
    found["idle"] = await pools.idle(args.asked)
    found["low"] = await measure_load(pools.client, args.low, args.seed, pools.vocab_size, args.max_model_len)
    ttft, itl = found["low"]["summary"]["ttft"], found["low"]["summary"]["itl"]
    if ttft and itl:
        report(f"{args.low}: TTFT p50 {ttft['p50'] * 1e3:.1f} ms, ITL p50 {itl['p50'] * 1e3:.2f} ms")
    fleet = measured_fleet(pools.workers, args.asked, found["idle"]["ttft_s"], args.max_num_batched_tokens)
    (plan,) = plans_of(fleet, [split], args.asked, args.share)
    found["plan"] = plan_to_json(plan)
    report(f"{args.asked.name}: planned {plan.goodput_per_s:.2f}/s")
    await pools.search(
        args.asked,
        plan.goodput_per_s or _NO_GUESS * plan.saturated_per_s,
        standing_of(fleet, split, args.asked, objective_of(args.asked, args.share)),
        lead_of(fleet, split, args.asked),
        Window(args.settle, args.window, args.share, args.tries, args.seed),
        until,
        report,
        found,
    )
    report(f"{args.asked.name}: goodput {found['goodput']['relation']} {found['goodput']['rate']:.2f}/s")


async def measure(
    args: argparse.Namespace, folder: Path, log: Path, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Both sides, one after the other, within the time."""
    began = time.perf_counter()
    until = began + args.seconds
    environ, _ = kernel_caches(args.kernel_cache)
    with ClientProcesses(args.clients) as clients:
        for number, (split, settings) in enumerate(SETTINGS.items()):
            ends = time_for(until, len(SETTINGS) - number)
            here: dict[str, Any] = {"split": str(split)}
            found["sides"].append(here)
            around = {"CUDA_VISIBLE_DEVICES": args.devices, **environ}
            own_log = log.with_name(f"{log.stem}_{str(split).replace(' ', '_')}{log.suffix}")
            try:
                async with running_pools(args, folder, around, settings, own_log, clients, ends) as pools:
                    print(f"{split} ready after {pools.start_s:.1f} s", file=sys.stderr, flush=True)
                    await measure_side(pools, split, args, ends - _STOP_S, here, save)
            except BatonError as error:
                here["error"] = str(error)
                print(f"gpu_losing_case: {split}: {error}", file=sys.stderr, flush=True)
            found["seconds"] = time.perf_counter() - began
            save()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_losing_case", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="0,1", metavar="N,N", help="two GPUs (default: 0,1)")
    parser.add_argument(
        "--low", type=Load.parse, default=Load.parse(LOW), metavar="R:P:O:S", help="the low load (default: %(default)s)"
    )
    parser.add_argument(
        "--asked", type=parse_asked, default=parse_asked(ASKED), metavar="NAME:P:O:TTFT:TPOT",
        help="what decode bounds: tokens in and out, objectives in ms",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_losing_case.json", metavar="FILE")
    add_arguments(parser, 145.0)
    args = parser.parse_args(argv)
    environment, config = Environment.capture(threads=None), config_of(args)
    found: dict[str, Any] = {"low": asdict(args.low), "asked": args.asked.to_json(), "sides": []}

    def save() -> None:
        write_json(args.output, to_json("gpu_losing_case", environment, config, found))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        asyncio.run(measure(args, folder, args.log or Path(scratch) / "server.log", found, save))
    return 1 if any("error" in here for here in found["sides"]) else 0


if __name__ == "__main__":
    sys.exit(main())
