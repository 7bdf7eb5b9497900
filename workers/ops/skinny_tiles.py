"""Which matrix products of a few rows run in the kernel of `skinny_linear`, and with what tiles."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from workers.ops.measured_gpu import is_measured

ROWS = (16, 32, 64)
"""Rows of x that a tile has room for, at least as many as tensor cores multiply; the rest is padded."""

MAX_ROWS = ROWS[-1]


@dataclass(frozen=True)
class SkinnyTile:
    """One launch's shape.

    Attributes:
        features: rows of the weight that a program multiplies; of gate and up each, where there are both.
        inputs: columns of a step (BLOCK_K).
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        prefetched: bytes of weights that each thread brings to the L2 cache while the kernel before still runs.
        rows: rows of x that it has room for.
        splits: parts of the inputs that programs of their own multiply with; their results are summed up by what comes
            next (`skinny_split_linear`).
    """

    features: int
    inputs: int
    num_stages: int
    num_warps: int
    prefetched: int
    rows: int = ROWS[0]
    splits: int = 1


_NARROW = SkinnyTile(features=32, inputs=256, num_stages=6, num_warps=4, prefetched=512)
_WIDE = SkinnyTile(features=64, inputs=256, num_stages=3, num_warps=4, prefetched=512)
_WIDE_DEEP = replace(_WIDE, num_stages=4)
_GATED = SkinnyTile(features=32, inputs=256, num_stages=3, num_warps=4, prefetched=512)
_GATED_WIDE = SkinnyTile(features=64, inputs=128, num_stages=3, num_warps=4, prefetched=512)
_VOCABULARY = SkinnyTile(features=128, inputs=128, num_stages=3, num_warps=4, prefetched=512)

_GATED_MORE = SkinnyTile(features=64, inputs=64, num_stages=6, num_warps=4, prefetched=512)
_PARTS = SkinnyTile(features=64, inputs=128, num_stages=4, num_warps=4, prefetched=512)
_SMALL_PARTS = SkinnyTile(features=64, inputs=64, num_stages=6, num_warps=4, prefetched=512, splits=4)

Tiles = Mapping[int, SkinnyTile]
"""By the rows that they have room for."""


def _by_rows(*tiles: SkinnyTile) -> Tiles:
    return {tile.rows: tile for tile in tiles}


_OF_NARROW, _OF_WIDE, _OF_VOCABULARY = map(_by_rows, (_NARROW, _WIDE, _VOCABULARY))

SM90: Mapping[tuple[int, int, bool], Tiles] = MappingProxyType(
    {
        # (rows of the weight, its columns, whether they are gate and up)
        (28672, 4096, True): _by_rows(_GATED_WIDE, replace(_GATED_MORE, rows=32), replace(_GATED_MORE, rows=64)),
        **dict.fromkeys([(16384, 2048, True), (16384, 3072, True)], _by_rows(_GATED)),
        (6144, 4096, False): _by_rows(_WIDE_DEEP),
        (7168, 5120, False): _OF_WIDE,
        **dict.fromkeys([(4096, 1024, False), (8192, 1024, False)], _OF_WIDE),
        **dict.fromkeys([(8192, 2048, False), (8192, 14336, False)], _OF_WIDE),
        **dict.fromkeys([(1536, 1536, False), (2048, 1536, False), (2048, 2048, False)], _OF_NARROW),
        (3648, 2048, False): _OF_NARROW,
        **dict.fromkeys([(3072, 3072, False), (3072, 8192, False)], _OF_NARROW),
        **dict.fromkeys([(3584, 3584, False), (3584, 18944, False)], _OF_NARROW),
        **{(4096, size, False): _OF_NARROW for size in (3584, 4096, 7168, 12288, 14336)},
        **{(128256, size, False): _OF_VOCABULARY for size in (2048, 4096)},
        **{(151936, size, False): _OF_VOCABULARY for size in (1536, 4096)},
        **dict.fromkeys([(32768, 4096, False), (64128, 4096, False), (152064, 3584, False)], _OF_VOCABULARY),
    }
)
"""Products that are faster so than in cuBLAS 13 on an H200: of models of 1 to 14 billion parameters, and shares of
larger ones (benchmarks/results/skinny_linear_h200.json). What is here for 16 took less time for 1, 4 and 16 rows in
bfloat16, in a row of such products (`o_proj` of 4096 x 4096: 10.4 instead of 12.8 µs). `_GATED_WIDE` and `_WIDE_DEEP`
were chosen by the decode step of Llama-3.1-8B, where the L2 cache fills up while the small kernels run: not faster than
cuBLAS in a row, they save 1.8 % and 2.7 % of that step at batch 1, and 3.5 % and 1.0 % at batch 16. What is here for 32
and 64 was chosen by that step, too."""

SM90_SPLIT: Mapping[tuple[int, int], Tiles] = MappingProxyType(
    {
        # (rows of the weight, its columns)
        (4096, 14336): _by_rows(replace(_PARTS, rows=64, splits=2)),
        (2048, 4096): _by_rows(replace(_PARTS, rows=32, splits=4), replace(_SMALL_PARTS, rows=64)),
        (2048, 2048): _by_rows(
            SkinnyTile(features=32, inputs=128, num_stages=6, num_warps=4, prefetched=512, rows=32, splits=2),
            replace(_SMALL_PARTS, rows=64),
        ),
        (2880, 4096): _by_rows(
            replace(_PARTS, splits=4), replace(_PARTS, rows=32, splits=4), replace(_PARTS, rows=64, splits=2)
        ),
    }
)
"""Products into the residual stream that are faster in parts, which the norm behind them sums up: few features and many
inputs make few programs, and each of them would read all of x. Chosen with that norm, as above."""


@functools.cache
def skinny_tile(
    num_rows: int, num_features: int, num_inputs: int, dtype: torch.dtype, device: torch.device, gated: bool = False
) -> SkinnyTile | None:
    """The tile for a product of the model, None where the device's own library is to compute it.

    Args:
        num_rows: of x.
        num_features: rows of the weight.
        num_inputs: columns of the weight.
        dtype: of x and the weight.
        device: where they are.
        gated: whether the weight is gate and up.
    """
    return _chosen(SM90.get((num_features, num_inputs, gated)), num_rows, dtype, device)


@functools.cache
def split_tile(
    num_rows: int, num_features: int, num_inputs: int, dtype: torch.dtype, device: torch.device
) -> SkinnyTile | None:
    """The tile for a product whose parts can be summed up later, None where it is not to be taken apart.

    Args:
        num_rows: of x.
        num_features: rows of the weight.
        num_inputs: columns of the weight.
        dtype: of x and the weight.
        device: where they are.
    """
    return _chosen(SM90_SPLIT.get((num_features, num_inputs)), num_rows, dtype, device)


def _chosen(tiles: Tiles | None, num_rows: int, dtype: torch.dtype, device: torch.device) -> SkinnyTile | None:
    if tiles is None or not 1 <= num_rows <= MAX_ROWS:
        return None
    if dtype not in (torch.bfloat16, torch.float16) or not is_measured(device):
        return None
    return tiles.get(next(rows for rows in ROWS if rows >= num_rows))


def fits(tile: SkinnyTile, num_features: int, num_inputs: int, gated: bool = False) -> bool:
    """Whether the tile divides a weight of that shape."""
    features = tile.features * (2 if gated else 1)
    return num_features % features == 0 and num_inputs % (tile.inputs * tile.splits) == 0
