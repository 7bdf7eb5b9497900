"""How many GPUs should prefill and how many decode: every split of a machine's GPUs, three workloads, goodput of each.

    python -m benchmarks.gpu_pool_ratio --devices 0,1,2,3

Starts `baton up` once for every split, with the shape of Llama-3.1-8B and random weights in bfloat16, reads what the
workers have measured of themselves, has the planner of `baton plan` predict every split, and looks for each workload's
goodput around the prediction: the highest rate of Poisson arrivals at which 90 % of requests meet their objectives.
Ends by itself when its time is up; what is there is saved after every rate.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.client_processes import ClientProcesses
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.gpu_handoff import kernel_caches
from benchmarks.model_shapes import model_folder
from benchmarks.report import to_json, write_json
from benchmarks.running_pools import Asked, RunningPools, Window, add_arguments, parse_asked, running_pools, time_for
from cluster.api import WorkerStatus
from cluster.planning.measured import fleet_of
from cluster.planning.plans import Plan, outlook, plan_split, recommend, splits_of
from cluster.planning.terms import Fleet, Lengths, Objective, Split, Workload
from workers.errors import BatonError

WORKLOADS = ("prompt-heavy:4000:100:1000:10", "balanced:1000:300:500:8", "output-heavy:500:800:500:7")
_STOP_S = 8.0
_MAX_QUEUE = 2048
_NO_GUESS = 0.5

Save = Callable[[], None]


def plans_of(fleet: Fleet, splits: Sequence[Split], asked: Asked, share: float) -> list[Plan]:
    """What the planner says of every split for a workload."""
    return [plan_split(fleet, split, workload_of(asked), objective_of(asked, share)) for split in splits]


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """What is kept of a plan."""
    return {
        "split": str(plan.split),
        "goodput_per_s": plan.goodput_per_s,
        "saturated_per_s": plan.saturated_per_s,
        "saturates": plan.saturates,
        "bound_by": plan.bound_by,
        "ttft_mean_s": plan.at.prefill.ttft_mean_s,
        "ttft_s": plan.at.prefill.ttft_s,
        "itl_s": plan.at.decode.itl_s,
        "prefill_busy": plan.at.prefill.busy,
        "decode_batch": plan.at.decode.batch,
    }


async def measure_split(
    pools: RunningPools,
    splits: Sequence[Split],
    split: Split,
    args: argparse.Namespace,
    until: float,
    found: Any,
    save: Save,
) -> None:
    """Every workload on a service that has this split; `found` is filled as it goes."""
    window = Window(args.settle, args.window, args.share, args.tries, args.seed)

    def report(line: str) -> None:
        print(f"{split} {line}", file=sys.stderr, flush=True)
        save()

    found["start_s"], found["workers"] = pools.start_s, [asdict(worker) for worker in pools.workers]
    found["workloads"] = []
    for number, asked in enumerate(args.workloads):
        here: dict[str, Any] = {"name": asked.name}
        found["workloads"].append(here)
        here["idle"] = await pools.idle(asked)
        fleet = measured_fleet(pools.workers, asked, here["idle"]["ttft_s"], args.max_num_batched_tokens)
        plans = plans_of(fleet, splits, asked, args.share)
        here["plans"], here["recommended"] = list(map(plan_to_json, plans)), str(recommend(plans).split)
        plan = next(plan for plan in plans if plan.split == split)
        guess = plan.goodput_per_s or _NO_GUESS * plan.saturated_per_s
        report(f"{asked.name}: planned {plan.goodput_per_s:.2f}/s, {plan.bound_by}; recommended {here['recommended']}")
        ends = time_for(until, len(args.workloads) - number)
        await pools.search(
            asked,
            guess,
            standing_of(fleet, split, asked, objective_of(asked, args.share)),
            lead_of(fleet, split, asked),
            window,
            ends,
            report,
            here,
        )
        report(f"{asked.name}: goodput {here['goodput']['relation']} {here['goodput']['rate']:.2f}/s")


def measured_fleet(workers: Sequence[WorkerStatus], asked: Asked, ttft_s: float, max_num_batched_tokens: int) -> Fleet:
    """What the workers say of themselves, and what a first token takes besides its prompt on an idle service."""
    fleet = fleet_of(workers, max_num_batched_tokens=max_num_batched_tokens, tokens=asked.prompt_tokens)
    overhead_s = max(0.0, ttft_s - fleet.prefill.seconds(asked.prompt_tokens))
    return Fleet(fleet.prefill, fleet.decode, overhead_s)


def standing_of(fleet: Fleet, split: Split, asked: Asked, objective: Objective) -> Callable[[float], float]:
    """Rate to the requests that are decoding then: what the planner says, at most all places."""

    def standing(rate: float) -> float:
        return split.decode * outlook(fleet, split, workload_of(asked), objective, rate).decode.batch

    return standing


def lead_of(fleet: Fleet, split: Split, asked: Asked) -> Callable[[float], float]:
    """Requests to the time that their prompts take when all come at once."""
    return lambda number: number * fleet.prefill.seconds(asked.prompt_tokens) / (split.prefill or split.decode)


def workload_of(asked: Asked) -> Workload:
    """As the planner is told of it."""
    return Workload(Lengths((asked.prompt_tokens,)), Lengths((asked.output_tokens,)))


def objective_of(asked: Asked, share: float) -> Objective:
    """As the planner is told of it."""
    assert asked.objective.ttft is not None
    assert asked.objective.tpot is not None
    return Objective(asked.objective.ttft, asked.objective.tpot, share)


async def measure(args: argparse.Namespace, folder: Path, log: Path, found: dict[str, Any], save: Save) -> None:
    """Every split, one after the other, within the time."""
    began = time.perf_counter()
    until = began + args.seconds
    environ, _ = kernel_caches(args.kernel_cache)
    splits = splits_of(len(args.devices.split(",")))
    found["splits"] = []
    with ClientProcesses(args.clients) as clients:
        for number, split in enumerate(splits):
            ends = time_for(until, len(splits) - number)
            here: dict[str, Any] = {"split": str(split), "prefill": split.prefill, "decode": split.decode}
            found["splits"].append(here)
            settings = {
                "prefill.replicas": split.prefill,
                "decode.replicas": split.decode,
                "server.max_queue": _MAX_QUEUE,
            }
            around = {"CUDA_VISIBLE_DEVICES": args.devices, **environ}
            try:
                async with running_pools(args, folder, around, settings, _log_of(log, split), clients, ends) as pools:
                    print(f"{split} ready after {pools.start_s:.1f} s", file=sys.stderr, flush=True)
                    await measure_split(pools, splits, split, args, ends - _STOP_S, here, save)
            except BatonError as error:
                here["error"] = str(error)
                print(f"gpu_pool_ratio: {split}: {error}", file=sys.stderr, flush=True)
            found["seconds"] = time.perf_counter() - began
            save()


def _log_of(log: Path, split: Split) -> Path:
    return log.with_name(f"{log.stem}_{split}{log.suffix}")


def config_of(args: argparse.Namespace) -> Mapping[str, Any]:
    """The flags as they are kept with the result."""
    left_out = {"output", "model", "kernel_cache", "workloads", "log", "low", "asked"}
    flags = {name: value for name, value in vars(args).items() if name not in left_out}
    return {**flags, "engine": "baton", "gpu_names": gpu_names()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_pool_ratio", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="0,1,2,3", metavar="N,N…", help="GPUs to split up (default: 0,1,2,3)")
    parser.add_argument(
        "--workloads", type=parse_asked, nargs="+", default=[parse_asked(text) for text in WORKLOADS],
        metavar="NAME:P:O:TTFT:TPOT", help="tokens in and out, objectives in ms",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_pool_ratio.json", metavar="FILE")
    add_arguments(parser, 470.0)
    args = parser.parse_args(argv)
    environment, config = Environment.capture(threads=None), config_of(args)
    found: dict[str, Any] = {"workloads": [asked.to_json() for asked in args.workloads]}

    def save() -> None:
        write_json(args.output, to_json("gpu_pool_ratio", environment, config, found))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        asyncio.run(measure(args, folder, args.log or Path(scratch) / "server.log", found, save))
    failed = [here["split"] for here in found["splits"] if "error" in here]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
