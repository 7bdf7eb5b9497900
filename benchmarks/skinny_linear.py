"""Matrix products of a few rows, in `skinny_linear` and in the device's own library: what `skinny_tiles` goes by.

    python -m benchmarks.skinny_linear

Every product reads another weight than the one before, together more than a cache holds; they run in one CUDA graph.
In a decode step the small kernels between the products leave the memory idle, and prefetching gains more than here:
a tile that is as fast as the library here can still be the faster one there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.device_timing import time_calls
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.report import to_json, write_json
from workers.ops.silu_and_mul import silu_and_mul
from workers.ops.skinny_linear import skinny_gated_linear, skinny_linear
from workers.ops.skinny_tiles import SM90, SkinnyTile, fits

Shape = tuple[int, int, bool]

_BYTES = 300_000_000  # of weights that are read in turn
_FEWEST_CALLS = 12


def measure_shape(shape: Shape, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Microseconds of one product: by number of rows, in the library and with the table's tiles.

    Args:
        shape: rows of the weight, its columns, whether they are gate and up.
        rows: numbers of rows of x.
        device: where to measure.
    """
    num_features, num_inputs, gated = shape
    size = num_features * num_inputs
    copies = max(2, _BYTES // (2 * size) + 1)
    weights = torch.empty(copies, num_features, num_inputs, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
    found: dict[str, Any] = {"shape": shape, "bytes": 2 * size, "us": {}}
    for num_rows in rows:
        x = torch.randn(num_rows, num_inputs, dtype=torch.bfloat16, device=device)
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"library": partial(_library, x, gated)}
        for tile in _tiles(shape):
            ways[_name(tile)] = partial(_skinny, x, tile, gated)
        found["us"][num_rows] = {name: _microseconds(way, weights, device) for name, way in ways.items()}
    return found


def _tiles(shape: Shape) -> list[SkinnyTile]:
    """The tiles of the table for products of this kind, gated or not, that divide the shape."""
    tiles = dict.fromkeys(tile for (_, _, gated), tile in SM90.items() if gated == shape[2])
    return [tile for tile in tiles if fits(tile, *shape)]


def _library(x: torch.Tensor, gated: bool, weight: torch.Tensor) -> torch.Tensor:
    product = F.linear(x, weight)
    return silu_and_mul(product) if gated else product


def _skinny(x: torch.Tensor, tile: SkinnyTile, gated: bool, weight: torch.Tensor) -> torch.Tensor:
    return skinny_gated_linear(x, weight, tile) if gated else skinny_linear(x, weight, tile)


def _microseconds(way: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor, device: torch.device) -> float:
    calls = [partial(way, weights[i % len(weights)]) for i in range(max(_FEWEST_CALLS, len(weights)))]
    return round(time_calls(calls, device, graph=True).seconds * 1e6, 2)


def _name(tile: SkinnyTile) -> str:
    return f"{tile.features}x{tile.inputs}, {tile.num_stages} stages"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every shape of the table and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skinny_linear", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="rows of x")
    parser.add_argument("--output", type=Path, default=RESULTS / "skinny_linear.json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    products = []
    with torch.inference_mode():
        for shape in SM90:
            products.append(measure_shape(shape, args.rows, device))
            print(products[-1], file=sys.stderr)
    environment = Environment.capture(threads=None)
    results = {"products": products}
    write_json(args.output, to_json("skinny_linear", environment, {"rows": args.rows, "gpus": gpu_names()}, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
