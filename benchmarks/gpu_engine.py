"""The engine on one GPU without a service: prefill and decode at fixed points, beside the limits of that GPU.

    python -m benchmarks.gpu_engine

The shape of Llama-3.1-8B, or of what `--model` names, with random weights in bfloat16. Prefill goes through a prefill
worker that hands nothing over, decode through a decode worker whose prompts are in its cache from the start; each is
built as a service builds it. `python -m benchmarks.peers.vllm_engine` measures vLLM at the same points with the same
code.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_timing import copy_bandwidth, matrix_rate, release_memory
from benchmarks.engine_points import (
    Plan,
    Point,
    add_point_arguments,
    decode_rows,
    own_turn,
    plan_of,
    prefill_rows,
)
from benchmarks.engine_sides import DecodeSide, PrefillSide, build_worker
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.model_shapes import MODEL_HELP, model_folder
from benchmarks.model_work import Work
from benchmarks.report import to_json, write_json
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker
from workers.errors import BatonError
from workers.models.expert_weights import EXPERT_WEIGHTS
from workers.prefill_worker import PrefillWorker

_PREFILL_SEQS = 32
_NOT_SETTINGS = ("prefill", "decode", "sampled", "output", "turn")


def measure(args: argparse.Namespace, folder: Path, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure the limits and every point; what is there so far is saved after each part."""
    device = torch.device(args.device)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = plan_of(args, int(config["vocab_size"]))
    longest = plan.longest(args.prefill, [*args.decode, *args.sampled])
    dtype = getattr(torch, args.dtype)
    work = Work.of(config, dtype.itemsize)
    with torch.inference_mode():
        limits = {"copy_bytes_per_s": copy_bandwidth(device), "matrix_flops_per_s": matrix_rate(device, dtype)}
    release_memory(device)
    print(f"limits: {limits}", file=sys.stderr)
    found: dict[str, Any] = {"limits": limits, "prefill": [], "decode": [], "start_up": {}, "workers": {}}
    for role in ("prefill", "decode"):
        seqs = _PREFILL_SEQS if role == "prefill" else max(p.batch for p in (*args.decode, *args.sampled))
        worker_config = WorkerConfig(
            name=f"{role}-0",
            role=role,
            model=str(folder),
            dtype=args.dtype,
            expert_weights=args.expert_weights,
            load_format="dummy",
            device=args.device,
            block_size=64 if device.type == "cuda" else 16,
            max_model_len=longest,
            max_num_seqs=seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        worker, start_up, about = build_worker(worker_config, longest)
        found["start_up"][role], found["workers"][role] = vars(start_up), about
        print(f"{role}: {about}, {start_up}", file=sys.stderr)
        _measure_role(worker, args, plan, work, found, save)
        del worker
        release_memory(device)
    return found


def _measure_role(
    worker: PrefillWorker | DecodeWorker,
    args: argparse.Namespace,
    plan: Plan,
    work: Work,
    found: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Measure the points of a worker's role, each beside its limit."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if isinstance(worker, PrefillWorker):
        for row in prefill_rows(PrefillSide(worker), args.prefill, plan, report):
            found["prefill"].append({**row, **prefill_limit(row, found["limits"], work)})
            save(found)
        return
    side = DecodeSide(worker)
    for points, sampled in ((args.decode, False), (args.sampled, True)):
        for row in decode_rows(side, points, plan, sampled, report):
            found["decode"].append({**row, **decode_limit(row, found["limits"], work)})
            save(found)


def prefill_limit(row: Mapping[str, Any], limits: Mapping[str, float], work: Work) -> dict[str, float]:
    """The seconds that the operations of a prefill point take at the rate of a large matrix product, and the share."""
    point = Point.parse(row["point"])
    seconds = work.prefill_flops(point.batch, point.tokens) / limits["matrix_flops_per_s"]
    return {"limit_s": seconds, "of_limit": seconds * row["tokens_per_s"] / (point.batch * point.tokens)}


def decode_limit(row: Mapping[str, Any], limits: Mapping[str, float], work: Work) -> dict[str, float]:
    """The seconds that a decode step's reads or operations take at the device's rates, if longer; and the share."""
    batch, context = Point.parse(row["point"]).batch, row["context"]
    reads = work.decode_bytes(batch, context) / limits["copy_bytes_per_s"]
    seconds = max(reads, work.decode_flops(batch, context) / limits["matrix_flops_per_s"])
    return {"limit_s": seconds, "of_limit": seconds / row["mean"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_engine", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--expert-weights", choices=EXPERT_WEIGHTS, default="auto", help="of a model in MXFP4")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run that results belong to")
    parser.add_argument("--note", default="", help="what else is to be known of the run")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_engine_baton.json", metavar="FILE")
    add_point_arguments(parser)
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    config = {
        **{name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
        "model": None if args.model is None else args.model.name,
        "engine": "baton",
        "gpu_names": gpu_names(),
    }

    def save(found: dict[str, Any]) -> None:
        write_json(args.output, to_json("gpu_engine", environment, config, found))

    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(args.model, Path(scratch))
            with own_turn(args.turn):
                save(measure(args, folder, save))
    except (BatonError, ValueError) as error:
        print(f"gpu_engine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
