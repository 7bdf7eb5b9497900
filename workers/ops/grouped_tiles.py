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
            `many_rows`: pairs are; `tma_rows`: those as well, and Hopper's tensor memory accelerator reads.
        prefetched: bytes of weights that each thread of `few_rows` brings to the L2 cache before it waits, where its
            expert is known by then.
        copied: whether rows that `tma_rows` would gather are copied into the order of the pairs before, by a kernel of
            their own, so that the accelerator reads them, too.
    """

    rows: int
    outputs: int
    inputs: int
    bundle: int
    num_stages: int
    num_warps: int
    kernel: Literal["few_rows", "many_rows", "tma_rows"] = "many_rows"
    prefetched: int = 0
    copied: bool = False


STORED_OUTPUTS = 128
"""Of a tile of `tma_rows`, that are on their way to memory at a time."""

Ranges = Sequence[tuple[float, GroupedTile]]
"""From how many pairs of an expert on, on average, which tile is used."""

_FEW = GroupedTile(
    rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4, kernel="few_rows", prefetched=512
)

TILES: Ranges = (
    (0, _FEW),
    (12, replace(_FEW, rows=32, bundle=4)),
    (32, GroupedTile(rows=64, outputs=128, inputs=64, bundle=8, num_stages=4, num_warps=4)),
    (96, GroupedTile(rows=128, outputs=128, inputs=64, bundle=8, num_stages=3, num_warps=8)),
)
"""What is usual for such products; of devices that were not measured."""

_FEW_DEEP = replace(_FEW, inputs=64, num_stages=6)
_FEW_32 = replace(_FEW, rows=32, inputs=64, bundle=4)
_FEW_64 = replace(_FEW_32, rows=64)
_FEW_128 = replace(_FEW_32, rows=128, outputs=128, num_stages=3, num_warps=8)
_MANY_64 = GroupedTile(rows=64, outputs=128, inputs=64, bundle=8, num_stages=4, num_warps=4)
_MANY_128 = replace(_MANY_64, rows=128, num_stages=3, num_warps=8)
_MANY_WIDE = replace(_MANY_128, outputs=256)
_TMA_128 = replace(_MANY_128, num_stages=4, kernel="tma_rows")
_TMA_64 = replace(_MANY_64, kernel="tma_rows")

SM90: Mapping[bool, Ranges] = MappingProxyType(
    {
        True: (
            (0, _FEW_DEEP),
            (0.2, replace(_FEW, num_stages=3)),
            (12, _FEW_32),
            (24, _FEW_64),
            (96, _FEW_128),
            (512, _TMA_128),
        ),
        False: (
            (0, _FEW),
            (0.2, replace(_FEW, prefetched=0)),
            (12, replace(_FEW_32, outputs=128)),
            (24, _MANY_64),
            (96, _MANY_WIDE),
            (512, replace(_TMA_128, outputs=256)),
        ),
    }
)
"""On an H200, of gate and up together and of single products: what was fastest in most of the shapes that `python -m
benchmarks.moe` has (benchmarks/results/moe_h200.json). Both have the same rows everywhere: pairs are cut once. Tiles of
`tma_rows` begin where the fewest pairs were that they were measured with and won."""


def _with(ranges: Ranges, begin: float, tile: GroupedTile) -> Ranges:
    """The ranges with another tile in that which begins there."""
    return tuple((first, tile if first == begin else other) for first, other in ranges)


SM90_SHAPES: Mapping[Shape, Ranges] = MappingProxyType(
    {
        # gpt-oss-20b's first product
        (32, 5760, 2880, True): (
            (0, replace(_FEW_DEEP, num_stages=4)),
            *SM90[True][1:],
            (3000, replace(_TMA_128, copied=True)),
        ),
        # DeepSeek-V2-Lite's: a step of 256 tokens takes 2 % less with both
        (66, 2816, 2048, True): _with(SM90[True], 24, _TMA_64),
        (66, 2048, 1408, False): _with(SM90[False], 24, replace(_TMA_64, num_stages=3)),
    }
)
"""Shapes that were faster by more than 2 % with something else, and not slower with it elsewhere in the range."""

_TMA_FALLBACK_STAGES = 3
"""Of `many_rows` in place of `tma_rows`; the fastest depth of such tiles."""

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
    mean = num_pairs / shape[0]
    ranges = SM90_SHAPES.get(shape, SM90[shape[3]]) if arch == "sm90" else TILES
    tile = _FLOAT32 if dtype == torch.float32 else [tile for begin, tile in ranges if mean >= begin][-1]
    return fitted(tile, shape[3], dtype, shared_memory)


def without_tma(tile: GroupedTile) -> GroupedTile:
    """What to use in place of a tile of `tma_rows` where the accelerator cannot read: the same pairs and outputs."""
    num_stages = min(tile.num_stages, _TMA_FALLBACK_STAGES)
    return replace(tile, kernel="many_rows", num_stages=num_stages, copied=False)


def fitted(tile: GroupedTile, gated: bool, dtype: torch.dtype, shared_memory: int) -> GroupedTile:
    """The tile with no more stages than fit so many bytes of shared memory."""
    num_stages = (shared_memory - staged_bytes(tile, gated, dtype, 0)) // staged_bytes(tile, gated, dtype, 1, 0)
    return replace(tile, num_stages=max(1, min(tile.num_stages, num_stages)))


def staged_bytes(tile: GroupedTile, gated: bool, dtype: torch.dtype, num_stages: int, result: int = 1) -> int:
    """Shared memory of so many stages, with that of a result on its way to memory where it has a place of its own."""
    stage = (tile.rows + tile.outputs * (2 if gated else 1)) * tile.inputs * dtype.itemsize
    if tile.kernel == "tma_rows":
        return num_stages * stage + result * (tile.rows * min(tile.outputs, STORED_OUTPUTS) * dtype.itemsize + 1024)
    return num_stages * stage
