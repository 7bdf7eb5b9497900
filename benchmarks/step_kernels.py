"""Where a decode step's time goes: its kernels, as PyTorch's profiler sees them in replayed CUDA graphs.

    python -m benchmarks.step_kernels --model deepseek-v2-lite --decode 1x192 16x192 64x192

For each point the kernels of one step, by name, with how often each runs and how long in all; what is between them is
the difference to the step's own time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_points import Point
from benchmarks.engine_sides import DecodeSide, build_worker
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.model_shapes import MODEL_HELP, model_folder
from benchmarks.report import to_json, write_json
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker

_STEPS = 16


def measure(side: DecodeSide, point: Point, vocab_size: int) -> dict[str, Any]:
    """One point."""
    generator = torch.Generator().manual_seed(0)
    for i in range(point.batch):
        prompt = torch.randint(10, vocab_size, (point.tokens,), generator=generator).tolist()
        side.add(f"{point}-{i}", prompt, 6 * _STEPS, False)
    for _ in range(2 * _STEPS):
        side.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_STEPS):
        side.step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - begin) / _STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(_STEPS):
            side.step()
        torch.cuda.synchronize()
    while side.busy:
        side.step()
    return {"point": str(point), "step_s": step_s, "kernels": _kernels(profiled)}


def _kernels(profiled: Any) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events():
        if "CUDA" in str(event.device_type):
            found[event.name].append(event.device_time)
    rows = [
        {"kernel": name, "each_step": len(times) / _STEPS, "microseconds": sum(times) / _STEPS}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -float(row["microseconds"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("step_kernels", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--decode", type=Point.parse, nargs="*", default=[Point(1, 192)], metavar="BxT")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_kernels.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        vocab_size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        longest = max(point.tokens for point in args.decode) + 7 * _STEPS
        config = WorkerConfig(
            name="decode-0",
            role="decode",
            model=str(folder),
            dtype="bfloat16",
            load_format="dummy",
            device="cuda",
            block_size=64,
            max_model_len=longest,
            max_num_seqs=max(point.batch for point in args.decode),
        )
        worker, _, about = build_worker(config, longest)
        assert isinstance(worker, DecodeWorker)
        print(about, file=sys.stderr)
        side = DecodeSide(worker)
        for point in args.decode:
            rows.append(measure(side, point, vocab_size))
            _show(rows[-1])
            about_run = {"model": str(args.model), "gpu_names": gpu_names(), **about}
            write_json(args.output, to_json("step_kernels", environment, about_run, {"rows": rows}))
    return 0


def _show(row: dict[str, Any]) -> None:
    total = sum(kernel["microseconds"] for kernel in row["kernels"])
    print(f"{row['point']}: {row['step_s'] * 1e6:.0f} µs a step, {total:.0f} µs in kernels", file=sys.stderr)
    for kernel in row["kernels"][:25]:
        line = f"  {kernel['microseconds']:8.1f} µs  {kernel['each_step']:6.1f} ×  {kernel['kernel'][:100]}"
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
