"""Which matrix products of a few rows run in the kernel of `skinny_linear`, and with what tiles."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from workers.ops.measured_gpu import is_measured

MAX_ROWS = 16
"""Rows of x: the smallest tile that tensor cores multiply, padded."""


@dataclass(frozen=True)
class SkinnyTile:
    """One launch's shape.

    Attributes:
        features: rows of the weight that a program multiplies; of gate and up each, where there are both.
        inputs: columns of a step (BLOCK_K).
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        prefetched: bytes of weights that each thread brings to the L2 cache while the kernel before still runs.
    """

    features: int
    inputs: int
    num_stages: int
    num_warps: int
    prefetched: int


_NARROW = SkinnyTile(features=32, inputs=256, num_stages=6, num_warps=4, prefetched=512)
_WIDE = SkinnyTile(features=64, inputs=256, num_stages=3, num_warps=4, prefetched=512)
_WIDE_DEEP = replace(_WIDE, num_stages=4)
_GATED = SkinnyTile(features=32, inputs=256, num_stages=3, num_warps=4, prefetched=512)
_GATED_WIDE = SkinnyTile(features=64, inputs=128, num_stages=3, num_warps=4, prefetched=512)
_VOCABULARY = SkinnyTile(features=128, inputs=128, num_stages=3, num_warps=4, prefetched=512)

SM90: Mapping[tuple[int, int, bool], SkinnyTile] = MappingProxyType(
    {
        # (rows of the weight, its columns, whether they are gate and up)
        (28672, 4096, True): _GATED_WIDE,
        (16384, 2048, True): _GATED,
        (16384, 3072, True): _GATED,
        (6144, 4096, False): _WIDE_DEEP,
        (7168, 5120, False): _WIDE,
        **dict.fromkeys([(4096, 1024, False), (8192, 1024, False), (8192, 2048, False), (8192, 14336, False)], _WIDE),
        **dict.fromkeys([(1536, 1536, False), (2048, 1536, False), (2048, 2048, False)], _NARROW),
        (3648, 2048, False): _NARROW,
        **dict.fromkeys([(3072, 3072, False), (3072, 8192, False)], _NARROW),
        **dict.fromkeys([(3584, 3584, False), (3584, 18944, False)], _NARROW),
        **{(4096, size, False): _NARROW for size in (3584, 4096, 7168, 12288, 14336)},
        **{(128256, size, False): _VOCABULARY for size in (2048, 4096)},
        **{(151936, size, False): _VOCABULARY for size in (1536, 4096)},
        **dict.fromkeys([(32768, 4096, False), (64128, 4096, False), (152064, 3584, False)], _VOCABULARY),
    }
)
"""Products that are faster so than in cuBLAS 13 on an H200: of models of 1 to 14 billion parameters, and shares of
larger ones (benchmarks/results/skinny_linear_h200.json). What is here took less time for 1, 4 and 16 rows in bfloat16,
in a row of such products (`o_proj` of 4096 x 4096: 10.4 instead of 12.8 µs). `_GATED_WIDE` and `_WIDE_DEEP` were chosen
by the decode step of Llama-3.1-8B, where the L2 cache fills up while the small kernels run: not faster than cuBLAS in a
row, they save 1.8 % and 2.7 % of that step at batch 1, and 3.5 % and 1.0 % at batch 16."""


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
    if not 1 <= num_rows <= MAX_ROWS or dtype not in (torch.bfloat16, torch.float16) or not is_measured(device):
        return None
    return SM90.get((num_features, num_inputs, gated))


def fits(tile: SkinnyTile, num_features: int, num_inputs: int, gated: bool = False) -> bool:
    """Whether the tile divides a weight of that shape."""
    features = tile.features * (2 if gated else 1)
    return num_features % features == 0 and num_inputs % tile.inputs == 0
