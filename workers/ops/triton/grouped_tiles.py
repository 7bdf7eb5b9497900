"""The tiles of the grouped product, by how many pairs an expert has on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GroupedTile:
    """One launch's shape; all but `num_stages` powers of two, the sizes at least 16.

    Attributes:
        rows: pairs that a program multiplies.
        outputs: of an expert's outputs; of gate and up each, where there are both.
        inputs: of a step (BLOCK_K).
        bundle: tiles that follow each other in time for the same block of outputs.
        num_stages: depth of the software pipeline of loads.
        num_warps: warps of a program.
    """

    rows: int
    outputs: int
    inputs: int
    bundle: int
    num_stages: int
    num_warps: int


_FEW = GroupedTile(rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4)

TILES: Sequence[tuple[int, GroupedTile]] = (
    (0, _FEW),
    (12, replace(_FEW, rows=32, bundle=4)),
    (32, GroupedTile(rows=64, outputs=128, inputs=64, bundle=8, num_stages=4, num_warps=4)),
    (96, GroupedTile(rows=128, outputs=128, inputs=64, bundle=8, num_stages=3, num_warps=8)),
)
"""From how many pairs of an expert on which tile is used. What is usual for such products; not measured yet."""

_FLOAT32 = GroupedTile(rows=16, outputs=64, inputs=32, bundle=4, num_stages=2, num_warps=4)
"""Exact float32 is computed without tensor cores: large tiles would not fit the registers."""


def choose_tile(num_pairs: int, num_experts: int, dtype: torch.dtype, gated: bool, shared_memory: int) -> GroupedTile:
    """The table's tile, with as deep a pipeline as the shared memory of a program holds.

    Args:
        num_pairs: N.
        num_experts: E.
        dtype: of the operands.
        gated: whether two blocks of outputs are multiplied.
        shared_memory: bytes.
    """
    mean = num_pairs // num_experts
    tile = _FLOAT32 if dtype == torch.float32 else [tile for begin, tile in TILES if mean >= begin][-1]
    stage = (tile.rows + tile.outputs * (2 if gated else 1)) * tile.inputs * dtype.itemsize
    return replace(tile, num_stages=max(1, min(tile.num_stages, shared_memory // stage)))
