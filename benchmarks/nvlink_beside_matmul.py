"""How much a copy to another GPU slows the products of matrices that run beside it.

    python -m benchmarks.nvlink_beside_matmul

A stream multiplies as prefill does, pairs of products that stand for layers; another one copies 32 MB a layer to the
second GPU, layer by layer or several layers at once. Needs two GPUs that reach each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json

_TOKENS, _INPUTS, _OUTPUTS = 8192, 4096, 28672
_LAYERS, _LAYER_BYTES = 48, 32 << 20
_PAUSE_S = 0.15


@dataclass(frozen=True)
class Case:
    """What is copied beside the products.

    Attributes:
        name: in the result.
        layers: copied at once; 0: nothing is copied.
        pieces: that a copy consists of.
    """

    name: str
    layers: int = 0
    pieces: int = 1


CASES = (
    Case("none"),
    Case("1 layer", 1),
    Case("1 layer in 16 pieces", 1, 16),
    Case("1 layer in 128 pieces", 1, 128),
    Case("8 layers", 8),
    Case("16 layers", 16),
)


class Bench:
    """The matrices and the memory that is copied."""

    def __init__(self) -> None:
        like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda:0"}
        self._x, self._weight = torch.randn(_TOKENS, _INPUTS, **like), torch.randn(_INPUTS, _OUTPUTS, **like)
        self._out = torch.empty(_TOKENS, _OUTPUTS, **like)
        most = max(case.layers for case in CASES) * _LAYER_BYTES
        self._src = torch.zeros(most, dtype=torch.uint8, device="cuda:0")
        self._dst = torch.zeros(most, dtype=torch.uint8, device="cuda:1")
        self._side = torch.cuda.Stream(device="cuda:0")

    def run(self, case: Case) -> tuple[float, float]:
        """Milliseconds of a layer, and of a copy."""
        main = torch.cuda.current_stream(0)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        copies = []
        began.record(main)
        for layer in range(_LAYERS):
            for _ in range(2):
                torch.mm(self._x, self._weight, out=self._out)
            if case.layers and (layer + 1) % case.layers == 0:
                copies.append(self._copy(case, main))
        ended.record(main)
        for device in range(2):
            torch.cuda.synchronize(device)
        copy_ms = statistics.median(a.elapsed_time(b) for a, b in copies) if copies else 0.0
        return began.elapsed_time(ended) / _LAYERS, copy_ms

    def _copy(self, case: Case, main: torch.cuda.Stream) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        computed = torch.cuda.Event()
        computed.record(main)
        self._side.wait_event(computed)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        size = case.layers * _LAYER_BYTES // case.pieces
        with torch.cuda.stream(self._side):
            began.record(self._side)
            for start in range(0, size * case.pieces, size):
                self._dst[start : start + size].copy_(self._src[start : start + size], non_blocking=True)
            ended.record(self._side)
        return began, ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("nvlink_beside_matmul", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=4, metavar="N", help="of each case, in turns (default: 4)")
    parser.add_argument("--output", type=Path, default=RESULTS / "nvlink_beside_matmul_h200.json", metavar="FILE")
    args = parser.parse_args(argv)
    if torch.cuda.device_count() < 2:
        print("nvlink_beside_matmul needs two GPUs", file=sys.stderr)
        return 1
    bench, environment = Bench(), Environment.capture(threads=None)
    times: dict[str, list[tuple[float, float]]] = {case.name: [] for case in CASES}
    for case in CASES:
        bench.run(case)
    for _ in range(args.repeats):
        for case in CASES:
            time.sleep(_PAUSE_S)
            times[case.name].append(bench.run(case))
    cases = [
        {
            "copied at once": name,
            "layer_ms": statistics.median(layer for layer, _ in runs),
            "copy_ms": statistics.median(copy for _, copy in runs),
        }
        for name, runs in times.items()
    ]
    for row in cases:
        print(row)
    config = {"layer_bytes": _LAYER_BYTES, "repeats": args.repeats, "gpu_names": gpu_names()}
    write_json(args.output, to_json("nvlink_beside_matmul", environment, config, {"cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
