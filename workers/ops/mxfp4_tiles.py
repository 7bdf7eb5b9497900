"""The tiles of the grouped product with weights in MXFP4, by how many pairs an expert has on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Mxfp4Tile:
    """One launch's shape; all but `num_stages` powers of two, `rows` at least 16 and `inputs` at least 64.

    Where programs stay, `rows` may be 8, `outputs` are 64, `inputs` 128, `bundle` 1 and `num_warps` 4.

    Attributes:
        rows: pairs that a program multiplies.
        outputs: of an expert's outputs; of gate and up each, where there are both.
        inputs: of a step.
        bundle: tiles that follow each other in time for the same block of outputs.
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        prefetched: blocks of 32 inputs of the program's weights that are brought to the L2 cache before it waits,
            where its expert is known by then.
        staying: programs of a multiprocessor that stay, and take one block of the result after the other; 0: a program
            for each block.
    """

    rows: int
    outputs: int
    inputs: int
    bundle: int
    num_stages: int
    num_warps: int
    prefetched: int = 0
    staying: int = 0


Ranges = Sequence[tuple[float, Mxfp4Tile]]
"""From how many pairs of an expert on, on average, which tile is used."""

# Measured on an H200 (benchmarks/results/moe_mxfp4_h200.json).
_FEW = Mxfp4Tile(rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4)
_MANY = replace(_FEW, rows=64, bundle=4, num_stages=3)
_MANY_SINGLE = replace(_MANY, outputs=128, num_stages=4, num_warps=8)

TILES: Mapping[bool, Ranges] = MappingProxyType(
    {
        True: ((0, _FEW), (12, replace(_MANY, rows=32)), (24, _MANY)),
        False: (
            (0, replace(_FEW, inputs=256, prefetched=8)),
            (1, replace(_FEW, prefetched=8)),
            (12, replace(_MANY_SINGLE, rows=32)),
            (24, _MANY_SINGLE),
        ),
    }
)
"""Of gate and up together, and of single products. Both have the same rows everywhere: pairs are cut once."""

# As many programs as a multiprocessor holds. Of fewer, placed while the kernel ahead ends, some would get too many.
_STAYING_FEW = replace(_FEW, rows=8, staying=8)
_STAYING = replace(_FEW, staying=4)

STAYING: Mapping[bool, Ranges] = MappingProxyType(
    {
        True: ((0, replace(_STAYING_FEW, staying=5)), (6, _STAYING), *TILES[True][1:]),
        False: ((0, _STAYING_FEW), (6, _STAYING), *TILES[False][2:]),
    }
)
"""Likewise, where the kernel whose programs stay runs."""

MOST_QUANTIZED = 320.0
"""Pairs of an expert, on average, from which on a layer's experts are dequantised for a product in bfloat16."""


def choose_mxfp4_tile(num_pairs: int, num_experts: int, gated: bool, shared_memory: int, staying: bool) -> Mxfp4Tile:
    """The table's tile, with as deep a pipeline as the shared memory of a program holds.

    Args:
        num_pairs: N.
        num_experts: E.
        gated: whether the weights are gate and up.
        shared_memory: bytes.
        staying: whether programs may stay.
    """
    mean, ranges = num_pairs / num_experts, (STAYING if staying else TILES)[gated]
    return mxfp4_fitted([tile for begin, tile in ranges if mean >= begin][-1], gated, shared_memory)


def mxfp4_fitted(tile: Mxfp4Tile, gated: bool, shared_memory: int) -> Mxfp4Tile:
    """The tile with no more stages than fit so many bytes of shared memory."""
    return replace(tile, num_stages=max(1, min(tile.num_stages, shared_memory // mxfp4_stage_bytes(tile, gated))))


def mxfp4_stage_bytes(tile: Mxfp4Tile, gated: bool) -> int:
    """Shared memory of a stage: packed weights, their scales, and rows of bfloat16."""
    weights = tile.outputs * (2 if gated else 1) * (tile.inputs // 2 + tile.inputs // 32)
    return weights + tile.rows * tile.inputs * torch.bfloat16.itemsize


def in_bfloat16(num_pairs: int, num_experts: int) -> bool:
    """Whether so many pairs are multiplied in bfloat16, with the experts dequantised before."""
    return num_pairs / num_experts >= MOST_QUANTIZED
