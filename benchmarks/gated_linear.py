"""SwiGLU's first half of many rows: cuBLAS and the activation's kernel beside quack's one kernel.

    python -m benchmarks.gated_linear

Every product reads another weight than the one before; they run in one CUDA graph. `host` is what launching a product
takes of the host's time, outside of a graph: a layer's kernels must take longer for it to be hidden.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.device_timing import synchronize, time_calls
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json
from workers.ops.gated_linear import quack_gated_linear, usable
from workers.ops.silu_and_mul import silu_and_mul

SHAPES = {
    "llama-3.1-8b": (28672, 4096),
    "llama-3.2-1b": (16384, 2048),
    "qwen3-8b": (24576, 4096),
    "qwen2.5-7b": (37888, 3584),
    "llama-3.1-70b, a quarter": (14336, 8192),
}
"""Rows of the weight, gate above up, and its columns."""
ROWS = (1024, 1536, 2048, 3000, 8192, 16384)
_LAUNCHES = 50

Way = Callable[[torch.Tensor, torch.Tensor], object]


def two_kernels(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """cuBLAS, and the activation behind it."""
    return silu_and_mul(F.linear(x, weight))


def measure(shape: tuple[int, int], num_rows: int, device: torch.device) -> dict[str, float]:
    """Microseconds of a product by either way, and of launching one."""
    features, inputs = shape
    weights = torch.randn(2, features, inputs, dtype=torch.bfloat16, device=device) * 0.02
    x = torch.randn(num_rows, inputs, dtype=torch.bfloat16, device=device)
    found = {}
    for name, way in (("two kernels", two_kernels), ("one kernel", quack_gated_linear)):
        calls = [partial(way, x, weight) for weight in weights]
        found[name] = round(time_calls(calls, device, graph=True, enough_s=0.05).seconds * 1e6, 1)
        few = x[:1536]
        synchronize(device)
        began = time.perf_counter()
        for i in range(_LAUNCHES):
            way(few, weights[i % 2])
        found[f"{name}, host"] = round((time.perf_counter() - began) / _LAUNCHES * 1e6, 1)
        synchronize(device)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gated_linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "gated_linear_h200.json", metavar="FILE")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device())
    if not usable(device):
        print("quack's kernel cannot be used here", file=sys.stderr)
        return 1
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            us = {rows: measure(shape, rows, device) for rows in ROWS}
            found[name] = {"shape": shape, "us": us}
            for rows, row in us.items():
                ratio, host = row["one kernel"] / row["two kernels"], row["one kernel, host"]
                print(f"{name} {rows}: {row['two kernels']} -> {row['one kernel']} us, {ratio:.3f}; host {host} us")
    environment = Environment.capture(threads=None)
    write_json(args.output, to_json("gated_linear", environment, {"gpus": gpu_names()}, {"shapes": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
