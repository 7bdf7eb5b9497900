"""Where disaggregation loses: two GPUs as 1P1D, as two workers that do both, and as 1P1D that chooses for every prompt.

    python -m benchmarks.gpu_losing_case --devices 0,1

Starts `baton up` each way, with the shape of Llama-3.1-8B and random weights in bfloat16. First short requests at a
low rate, where neither GPU has much to do; then requests that are nearly all decode, for which one GPU decodes on one
side and two on the other: the goodput of each. Ends by itself when its time is up.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Side:
    """One way to use the two GPUs.

    Attributes:
        name: on the command line and in the result.
        split: as the planner is asked about it.
        replicas: settings of `baton up` that make the split.
    """

    name: str
    split: Split
    replicas: Mapping[str, int]

    @property
    def settings(self) -> dict[str, Any]:
        """All that `baton up` is told."""
        return {"router.disaggregation": self.name, "server.max_queue": _MAX_QUEUE, **self.replicas}


SIDES = {
    side.name: side
    for side in (
        Side("always", Split(1, 1), {"prefill.replicas": 1, "decode.replicas": 1}),
        Side("never", Split(0, 2), {"prefill.replicas": 0, "prefill.min_replicas": 0, "decode.replicas": 2}),
        Side("auto", Split(1, 1), {"prefill.replicas": 1, "decode.replicas": 1}),
    )
}
"""By the name that `router.disaggregation` has for it."""
_MAX_QUEUE = 2048
LOW, ASKED = "4:128:128:10", "decode-bound:128:512:1000:12"
_STOP_S = 8.0
_NO_GUESS = 0.5


async def measure_side(
    pools: RunningPools,
    side: Side,
    args: argparse.Namespace,
    until: float,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """The low load, then the goodput, on a service that is up; `found` is filled as it goes."""

    def report(line: str) -> None:
        print(f"{side.name}: {line}", file=sys.stderr, flush=True)
        save()

    found["start_s"], found["workers"] = pools.start_s, [asdict(worker) for worker in pools.workers]
    found["idle"] = await pools.idle(args.asked)
    if args.low is not None:
        found["low"] = await measure_load(pools.client, args.low, args.seed, pools.vocab_size, args.max_model_len)
        ttft, itl = found["low"]["summary"]["ttft"], found["low"]["summary"]["itl"]
        if ttft and itl:
            report(f"{args.low}: TTFT p50 {ttft['p50'] * 1e3:.1f} ms, ITL p50 {itl['p50'] * 1e3:.2f} ms")
    fleet = measured_fleet(pools.workers, args.asked, found["idle"]["ttft_s"], args.max_num_batched_tokens)
    (plan,) = plans_of(fleet, [side.split], args.asked, args.share)
    found["plan"] = plan_to_json(plan)
    report(f"{args.asked.name}: planned {plan.goodput_per_s:.2f}/s")
    await pools.search(
        args.asked,
        plan.goodput_per_s or _NO_GUESS * plan.saturated_per_s,
        standing_of(fleet, side.split, args.asked, objective_of(args.asked, args.share)),
        lead_of(fleet, side.split, args.asked),
        Window(args.settle, args.window, args.share, args.tries, args.seed),
        until,
        report,
        found,
    )
    report(f"{args.asked.name}: goodput {found['goodput']['relation']} {found['goodput']['rate']:.2f}/s")


async def measure(
    args: argparse.Namespace, folder: Path, log: Path, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Every side, one after the other, within the time."""
    began = time.perf_counter()
    until = began + args.seconds
    environ, _ = kernel_caches(args.kernel_cache)
    with ClientProcesses(args.clients) as clients:
        for number, name in enumerate(args.sides):
            side, ends = SIDES[name], time_for(until, len(args.sides) - number)
            here: dict[str, Any] = {"split": str(side.split), "disaggregation": name}
            found["sides"].append(here)
            around = {"CUDA_VISIBLE_DEVICES": args.devices, **environ}
            own_log = log.with_name(f"{log.stem}_{name}{log.suffix}")
            try:
                async with running_pools(args, folder, around, side.settings, own_log, clients, ends) as pools:
                    print(f"{name}: ready after {pools.start_s:.1f} s", file=sys.stderr, flush=True)
                    await measure_side(pools, side, args, ends - _STOP_S, here, save)
            except BatonError as error:
                here["error"] = str(error)
                print(f"gpu_losing_case: {name}: {error}", file=sys.stderr, flush=True)
            found["seconds"] = time.perf_counter() - began
            save()


def parse_low(text: str) -> Load | None:
    """A load, or None for "none".

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    return None if text == "none" else Load.parse(text)


def add_losing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is asked of which sides."""
    parser.add_argument(
        "--low", type=parse_low, default=parse_low(LOW), metavar="R:P:O:S",
        help=f"the low load, or none (default: {LOW})",
    )  # fmt: skip
    parser.add_argument(
        "--asked", type=parse_asked, default=parse_asked(ASKED), metavar="NAME:P:O:TTFT:TPOT",
        help="what decode bounds: tokens in and out, objectives in ms",
    )  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="default: all of them")


def empty_result(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked, and no side yet."""
    low = None if args.low is None else asdict(args.low)
    return {"low": low, "asked": args.asked.to_json(), "sides": []}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_losing_case", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="0,1", metavar="N,N", help="two GPUs (default: 0,1)")
    add_losing_arguments(parser)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_losing_case.json", metavar="FILE")
    add_arguments(parser, 220.0)
    args = parser.parse_args(argv)
    environment, config = Environment.capture(threads=None), config_of(args)
    found = empty_result(args)

    def save() -> None:
        write_json(args.output, to_json("gpu_losing_case", environment, config, found))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        asyncio.run(measure(args, folder, args.log or Path(scratch) / "server.log", found, save))
    return 1 if any("error" in here for here in found["sides"]) else 0


if __name__ == "__main__":
    sys.exit(main())
