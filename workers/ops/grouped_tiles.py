"""The tiles of the grouped product, by the shape of the weights and by how many pairs an expert has on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch

Shape = tuple[int, int, int, bool]
"""Experts, rows of an expert's weight, its columns, and whether they are gate and up."""


@dataclass(frozen=True)
class GroupedTile:
    """One launch's shape; all but `num_stages` and `prefetched` powers of two, the sizes at least 16.

    Attributes:
        rows: pairs that a program multiplies.
        outputs: of an expert's outputs; of gate and up each, where there are both.
        inputs: of a step (BLOCK_K).
        bundle: tiles that follow each other in time for the same block of outputs.
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
        kernel: `few_rows`: weights are the first operand of the matrix instruction, and launches are dependent ones;
            `many_rows`: pairs are.
        prefetched: bytes of weights that each thread of `few_rows` brings to the L2 cache before it waits, where its
            expert is known by then.
    """

    rows: int
    outputs: int
    inputs: int
    bundle: int
    num_stages: int
    num_warps: int
    kernel: Literal["few_rows", "many_rows"] = "many_rows"
    prefetched: int = 0


Ranges = Sequence[tuple[int, GroupedTile]]
"""From how many pairs of an expert on which tile is used."""

_FEW = GroupedTile(
    rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4, kernel="few_rows", prefetched=512
)

TILES: Ranges = (
    (0, _FEW),
    (12, replace(_FEW, rows=32, bundle=4)),
    (32, GroupedTile(rows=64, outputs=128, inputs=64, bundle=8, num_stages=4, num_warps=4)),
    (96, GroupedTile(rows=128, outputs=128, inputs=64, bundle=8, num_stages=3, num_warps=8)),
)
"""What is usual for such products; of shapes that were not measured."""

SM90: Mapping[Shape, Ranges] = MappingProxyType({})
"""Of shapes that `python -m benchmarks.moe` measured on an H200."""

_FLOAT32 = GroupedTile(rows=16, outputs=64, inputs=32, bundle=4, num_stages=2, num_warps=4)
"""Exact float32 is computed without tensor cores: large tiles would not fit the registers."""


def choose_tile(num_pairs: int, shape: Shape, dtype: torch.dtype, arch: str, shared_memory: int) -> GroupedTile:
    """The table's tile, with as deep a pipeline as the shared memory of a program holds.

    Args:
        num_pairs: N.
        shape: of the weights.
        dtype: of the operands.
        arch: of the device, as `device_traits` has it.
        shared_memory: bytes.
    """
    mean = num_pairs // shape[0]
    ranges = SM90.get(shape, TILES) if arch == "sm90" else TILES
    tile = _FLOAT32 if dtype == torch.float32 else [tile for begin, tile in ranges if mean >= begin][-1]
    return fitted(tile, shape[3], dtype, shared_memory)


def fitted(tile: GroupedTile, gated: bool, dtype: torch.dtype, shared_memory: int) -> GroupedTile:
    """The tile with no more stages than fit so many bytes of shared memory."""
    stage = (tile.rows + tile.outputs * (2 if gated else 1)) * tile.inputs * dtype.itemsize
    return replace(tile, num_stages=max(1, min(tile.num_stages, shared_memory // stage)))
