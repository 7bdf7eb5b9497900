"""Where the time of a step goes: its kernels, as PyTorch's profiler sees them, in replayed CUDA graphs too.

    python -m benchmarks.step_kernels --model deepseek-v2-lite --decode 1x192 16x192 64x192 --prefill 4x2048

For each point the kernels of one step, by name and by the kernel that ended before, with how often each runs, how long
in all, and what it adds: from the end of the kernel before to its own. Kernels that are launched before the one ahead
has ended (`attention/ops/triton/dependent_launch.py`) run for as long as they wait; what they add is the step's time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_timing import release_memory
from benchmarks.engine_points import Point
from benchmarks.engine_sides import DecodeSide, PrefillSide, build_worker
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.model_shapes import MODEL_HELP, model_folder
from benchmarks.report import to_json, write_json
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker
from workers.prefill_worker import PrefillWorker

_STEPS = 16
_BATCHED_TOKENS = 8192
"""Of a step of prompts, as in `benchmarks.gpu_engine`."""


@dataclass(frozen=True)
class Span:
    """A kernel's time on the GPU, in microseconds of the profiler's clock."""

    name: str
    begin: float
    end: float


def measure_decode(side: DecodeSide, point: Point, vocab_size: int) -> dict[str, Any]:
    """The steps of a batch that decodes."""
    for request_id, prompt in _prompts(point, vocab_size):
        side.add(request_id, prompt, 6 * _STEPS, False)
    for _ in range(2 * _STEPS):
        side.step()

    def steps() -> None:
        for _ in range(_STEPS):
            side.step()

    row = _measured(f"decode {point}", steps, _STEPS)
    while side.busy:
        side.step()
    return row


def measure_prefill(side: PrefillSide, point: Point, vocab_size: int) -> dict[str, Any]:
    """A batch of prompts, in as many steps as it takes: all of them count as one."""

    made = list(_prompts(point, vocab_size))

    def prompts() -> None:
        for request_id, prompt in made:
            side.add(request_id, prompt, 1, False)
        while side.busy:
            side.step()

    prompts()
    return _measured(f"prefill {point}", prompts, 1)


def _prompts(point: Point, vocab_size: int) -> Iterator[tuple[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    for i in range(point.batch):
        yield f"{point}-{i}", torch.randint(10, vocab_size, (point.tokens,), generator=generator).tolist()


def _measured(point: str, run: Callable[[], None], steps: int) -> dict[str, Any]:
    """Run once for the time of a step and once for its kernels."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - begin) / steps
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if "CUDA" in str(event.device_type)
    ]
    return {"point": point, "step_s": step_s, "kernels": kernels(spans, steps)}


def kernels(spans: Sequence[Span], steps: int) -> list[dict[str, Any]]:
    """The kernels of a step, what adds most first.

    Args:
        spans: of `steps` steps.
        steps: how many.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    before = Span("", *[min((span.begin for span in spans), default=0.0)] * 2)
    for span in sorted(spans, key=lambda span: span.end):
        found[before.name, span.name].append((span.end - span.begin, span.end - before.end))
        before = span
    rows = [
        {
            "kernel": name,
            "after": after,
            "each_step": len(times) / steps,
            "microseconds": sum(own for own, _ in times) / steps,
            "added_microseconds": sum(added for _, added in times) / steps,
        }
        for (after, name), times in found.items()
    ]
    return sorted(rows, key=lambda row: -float(row["added_microseconds"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("step_kernels", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--decode", type=Point.parse, nargs="*", default=[Point(1, 192)], metavar="BxT")
    parser.add_argument("--prefill", type=Point.parse, nargs="*", default=[], metavar="BxT")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_kernels.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        vocab_size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        points: dict[Literal["prefill", "decode"], list[Point]] = {"prefill": args.prefill, "decode": args.decode}
        for role, of_role in points.items():
            if not of_role:
                continue
            worker, about = _worker(role, of_role, folder)
            for point in of_role:
                if isinstance(worker, PrefillWorker):
                    rows.append(measure_prefill(PrefillSide(worker), point, vocab_size))
                else:
                    rows.append(measure_decode(DecodeSide(worker), point, vocab_size))
                _show(rows[-1])
                about_run = {"model": str(args.model), "gpu_names": gpu_names(), **about}
                write_json(args.output, to_json("step_kernels", environment, about_run, {"rows": rows}))
            del worker
            release_memory(torch.device("cuda"))
    return 0


def _worker(
    role: Literal["prefill", "decode"], points: Sequence[Point], folder: Path
) -> tuple[PrefillWorker | DecodeWorker, dict[str, Any]]:
    longest = max(point.tokens for point in points) + 7 * _STEPS
    config = WorkerConfig(
        name=f"{role}-0",
        role=role,
        model=str(folder),
        dtype="bfloat16",
        load_format="dummy",
        device="cuda",
        block_size=64,
        max_model_len=longest,
        max_num_seqs=max(point.batch for point in points),
        max_num_batched_tokens=_BATCHED_TOKENS,
    )
    worker, _, about = build_worker(config, longest)
    print(about, file=sys.stderr)
    return worker, about


def _show(row: dict[str, Any]) -> None:
    total = sum(kernel["microseconds"] for kernel in row["kernels"])
    print(f"{row['point']}: {row['step_s'] * 1e6:.0f} µs a step, {total:.0f} µs in kernels", file=sys.stderr)
    for kernel in row["kernels"][:30]:
        added, own = kernel["added_microseconds"], kernel["microseconds"]
        times = f"+ {added:8.1f} of {own:8.1f} µs {kernel['each_step']:6.1f} ×"
        print(f"  {times}  {kernel['kernel'][:70]}  after {kernel['after'][:40]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
