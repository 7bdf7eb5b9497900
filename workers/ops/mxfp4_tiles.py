"""The tiles of the grouped product with weights in MXFP4, by how many pairs an expert has on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Mxfp4Tile:
    """One launch's shape; all but `num_stages` powers of two, `rows` at least 16 and `inputs` at least 64.

    Attributes:
        rows: pairs that a program multiplies.
        outputs: of an expert's outputs; of gate and up each, where there are both.
        inputs: of a step.
        bundle: tiles that follow each other in time for the same block of outputs.
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        prefetched: blocks of 32 inputs of the program's weights that are brought to the L2 cache before it waits,
            where its expert is known by then.
        joined: the four quarters of a step are one product, not one each: numbers are then unpacked while those before
            them are multiplied.
        registers: most of a thread; 0: as many as the compiler wants. Fewer let more programs run side by side; too few
            make it wait for each matrix instruction.
    """

    rows: int
    outputs: int
    inputs: int
    bundle: int
    num_stages: int
    num_warps: int
    prefetched: int = 0
    joined: bool = False
    registers: int = 0


Ranges = Sequence[tuple[float, Mxfp4Tile]]
"""From how many pairs of an expert on, on average, which tile is used."""

_FEW = Mxfp4Tile(rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4, prefetched=16)

_SOME = Mxfp4Tile(rows=32, outputs=128, inputs=128, bundle=4, num_stages=3, num_warps=8)

TILES: Mapping[bool, Ranges] = MappingProxyType(
    {
        True: ((0, _FEW), (12, _SOME), (24, replace(_SOME, rows=64))),
        False: ((0, _FEW), (12, replace(_SOME, num_stages=4)), (24, replace(_SOME, rows=64, outputs=256))),
    }
)
"""Of gate and up together, and of single products. Both have the same rows everywhere: pairs are cut once."""

MOST_QUANTIZED = 256.0
"""Pairs of an expert, on average, from which on a layer's experts are dequantised for a product in bfloat16."""


def choose_mxfp4_tile(num_pairs: int, num_experts: int, gated: bool, shared_memory: int) -> Mxfp4Tile:
    """The table's tile, with as deep a pipeline as the shared memory of a program holds.

    Args:
        num_pairs: N.
        num_experts: E.
        gated: whether the weights are gate and up.
        shared_memory: bytes.
    """
    mean = num_pairs / num_experts
    return mxfp4_fitted([tile for begin, tile in TILES[gated] if mean >= begin][-1], gated, shared_memory)


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
