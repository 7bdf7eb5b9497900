"""Matrix products of a few rows, in `skinny_linear` and in the device's own library: what `skinny_tiles` goes by.

    python -m benchmarks.skinny_linear

Every product reads another weight than the one before, together more than a cache holds; they run in one CUDA graph.
In a decode step the small kernels between the products leave the memory idle, and prefetching gains more than here:
a tile that is as fast as the library here can still be the faster one there. Products in parts are measured with the
residual addition and the norm behind them, which sum the parts up.
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
from workers.ops.rms_norm import rms_norm
from workers.ops.silu_and_mul import silu_and_mul
from workers.ops.skinny_linear import skinny_gated_linear, skinny_linear, skinny_split_linear
from workers.ops.skinny_tiles import ROWS, SM90, SM90_SPLIT, SkinnyTile, fits
from workers.ops.weighted_sum import add_weighted_rms_norm

Shape = tuple[int, int, bool]

_BYTES = 300_000_000  # of weights that are read in turn
_FEWEST_CALLS = 12
_EPS = 1e-5


def measure_shape(shape: Shape, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Microseconds of one product: by number of rows, in the library and with the table's tiles.

    Args:
        shape: rows of the weight, its columns, whether they are gate and up.
        rows: numbers of rows of x; those are left out for which the table has no tile of this shape.
        device: where to measure.
    """
    num_features, num_inputs, gated = shape
    size = num_features * num_inputs
    copies = max(2, _BYTES // (2 * size) + 1)
    weights = torch.empty(copies, num_features, num_inputs, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
    found: dict[str, Any] = {"shape": shape, "bytes": 2 * size, "us": {}}
    for num_rows in rows:
        x = torch.randn(num_rows, num_inputs, dtype=torch.bfloat16, device=device)
        room = next(room for room in ROWS if room >= num_rows)
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        if room in SM90.get(shape, {}):
            ways["library"] = partial(_library, x, gated)
            for tile in _tiles(shape, room):
                ways[_name(tile)] = partial(_skinny, x, tile, gated)
        split = None if gated else SM90_SPLIT.get(shape[:2], {}).get(room)
        if split is not None:
            residual = torch.zeros(num_rows, num_features, dtype=torch.bfloat16, device=device)
            norm = torch.ones(num_features, dtype=torch.bfloat16, device=device)
            ways["library, norm"] = partial(_library_norm, x, residual, norm)
            ways[f"{_name(split)}, norm"] = partial(_split_norm, x, split, residual, norm)
        if ways:
            found["us"][num_rows] = {name: _microseconds(way, weights, device) for name, way in ways.items()}
    return found


def _tiles(shape: Shape, room: int) -> list[SkinnyTile]:
    """The tiles of the table for products of this kind, gated or not, and so many rows, that divide the shape."""
    of_kind = (tiles for (_, _, gated), tiles in SM90.items() if gated == shape[2])
    found = dict.fromkeys(tiles[room] for tiles in of_kind if room in tiles)
    return [tile for tile in found if fits(tile, *shape)]


def _library(x: torch.Tensor, gated: bool, weight: torch.Tensor) -> torch.Tensor:
    product = F.linear(x, weight)
    return silu_and_mul(product) if gated else product


def _library_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(torch.addmm(residual, x, weight.t(), out=residual), norm, _EPS)


def _split_norm(
    x: torch.Tensor, tile: SkinnyTile, residual: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return add_weighted_rms_norm(skinny_split_linear(x, weight, tile), residual, norm, _EPS)


def _skinny(x: torch.Tensor, tile: SkinnyTile, gated: bool, weight: torch.Tensor) -> torch.Tensor:
    return skinny_gated_linear(x, weight, tile) if gated else skinny_linear(x, weight, tile)


def _microseconds(way: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor, device: torch.device) -> float:
    calls = [partial(way, weights[i % len(weights)]) for i in range(max(_FEWEST_CALLS, len(weights)))]
    return round(time_calls(calls, device, graph=True).seconds * 1e6, 2)


def _name(tile: SkinnyTile) -> str:
    parts = "" if tile.splits == 1 else f", {tile.splits} parts"
    return f"{tile.features}x{tile.inputs}, {tile.num_stages} stages{parts}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every shape of the table and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skinny_linear", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 24, 64], metavar="N", help="rows of x")
    parser.add_argument("--output", type=Path, default=RESULTS / "skinny_linear.json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    products = []
    with torch.inference_mode():
        for shape in dict.fromkeys([*SM90, *((*shape, False) for shape in SM90_SPLIT)]):
            measured = measure_shape(shape, args.rows, device)
            if measured["us"]:
                products.append(measured)
                print(measured, file=sys.stderr)
    environment = Environment.capture(threads=None)
    results = {"products": products}
    write_json(args.output, to_json("skinny_linear", environment, {"rows": args.rows, "gpus": gpu_names()}, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
