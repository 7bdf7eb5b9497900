"""Launches of the kernels that read weights in MXFP4: a grouped product, and the numbers in bfloat16."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import device_traits, dot_dtype, on_device
from workers.ops.mxfp4_tiles import Mxfp4Tile, choose_mxfp4_tile
from workers.ops.triton.mxfp4_numbers import mxfp4_factors, mxfp4_in_order
from workers.ops.triton.mxfp4_rows import mxfp4_rows_kernel

DEQUANTIZED = (32, 256, 4)
"""Outputs, inputs (at least 128) and warps of a program that dequantises; powers of two."""


def computes_mxfp4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a device: bfloat16 on NVIDIA GPUs that multiply it outside of matrix instructions."""
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def mxfp4_tile(num_pairs: int, num_experts: int, gated: bool, device: torch.device) -> Mxfp4Tile:
    """The table's tile for N pairs."""
    return choose_mxfp4_tile(num_pairs, num_experts, gated, device_traits(device).shared_memory)


def launch_mxfp4_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    words: torch.Tensor,
    exponents: torch.Tensor,
    tile: Mxfp4Tile,
    tiles: torch.Tensor,
    pairs: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    pairs_per_row: int = 0,
    spread: bool = False,
    activation: tuple[str, float, float] | None = None,
    routed_before: bool = False,
) -> None:
    """Multiply into `out`; `workers.layers.moe.grouped_linear` checks the arguments.

    Args:
        out: (N, M), contiguous.
        x: rows of K contiguous elements.
        words: (E, G, M, 8) int16 of `mxfp4_words`, or (E, G, 2 * M, 8) with an activation: gate before up.
        exponents: (E, ceil(G / 4), M or 2 * M) int32 of `mxfp4_words`.
        tile: the launch's shape.
        tiles: of `token_groups.launch_tile_map`, for the rows of the tile; without `pairs` (N,) integers: each one's
            expert.
        pairs: (N,) int32 of the groups. None: each pair is a tile; neither x nor `out` is sorted.
        bias: (E, M or 2 * M).
        pairs_per_row: pair n reads row n // pairs_per_row of x; 0: x is sorted as `pairs`.
        spread: write the result of pair n to row n; else sorted as `pairs`.
        activation: kind, alpha and limit of a gated one.
        routed_before: whether the tiles were made before the kernel that made x was launched.
    """
    num_pairs, num_outputs = out.shape
    if num_pairs == 0 or num_outputs == 0:
        return
    num_tiles = tiles.shape[-1]
    kind, alpha, limit = activation or (None, 0.0, 0.0)
    dependent, threads = launches_dependents(x.device), 32 * tile.num_warps
    parts, num_blocks = 1 if activation is None else 2, words.shape[1]
    with on_device(x):
        mxfp4_rows_kernel[(num_tiles * triton.cdiv(num_outputs, tile.outputs),)](
            out,
            x,
            words,
            exponents,
            bias,
            pairs,
            tiles,
            num_tiles,
            x.stride(0),
            NUM_EXPERTS=words.shape[0],
            M=num_outputs,
            K=x.shape[1],
            PAIRS_PER_ROW=pairs_per_row,
            SPREAD=spread,
            ALONE=pairs is None,
            KIND=kind,
            ALPHA=alpha,
            LIMIT=limit,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            BUNDLE=tile.bundle,
            STAGES=tile.num_stages,
            PREFETCHED=min(tile.prefetched, num_blocks, threads // parts),
            THREADS=threads,
            ROUTED_BEFORE=routed_before,
            DOT_DTYPE=dot_dtype(x.dtype, x.dtype),
            PDL=dependent,
            num_warps=tile.num_warps,
            **({"launch_pdl": True} if dependent else {}),
        )


@triton.jit
def dequantize_mxfp4_kernel(
    out_ptr: tl.tensor,
    words_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    M: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` rows by `INPUTS` columns of one expert's matrix."""
    BLOCKS: tl.constexpr = INPUTS // 32
    ALL_FOURS: tl.constexpr = (K // 32 + 3) // 4
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * INPUTS
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (row < M)[:, None]
    word = tl.arange(0, BLOCKS * 8)
    four = tl.arange(0, BLOCKS // 4)
    block = begin // 32 + word // 8
    mask = inside & (block < K // 32)[None, :]
    words_ptrs = words_ptr + expert * (M * (K // 4)) + row[:, None] * 8 + (block * (M * 8) + word % 8)[None, :]
    words = tl.load(words_ptrs, mask=mask, other=0)
    fours = begin // 128 + four
    exponents_ptrs = exponents_ptr + expert * (M * ALL_FOURS) + row[:, None] + fours[None, :] * M
    exponents = tl.load(exponents_ptrs, mask=inside & (fours < ALL_FOURS)[None, :], other=0)
    factors = mxfp4_factors(exponents, OUTPUTS, BLOCKS, DOT_DTYPE)
    numbers = mxfp4_in_order(words, factors, OUTPUTS, BLOCKS, DOT_DTYPE)
    column = begin + tl.arange(0, INPUTS)
    out_ptrs = out_ptr + expert * (M * K) + row[:, None].to(tl.int64) * K + column[None, :]
    tl.store(out_ptrs, numbers.to(out_ptr.dtype.element_ty), mask=inside & (column < K)[None, :])


def launch_dequantize_mxfp4(
    out: torch.Tensor, words: torch.Tensor, exponents: torch.Tensor, shape: tuple[int, int, int] = DEQUANTIZED
) -> None:
    """The numbers of all experts into (E, M, K), contiguous; the rest as of `launch_mxfp4_linear` and `DEQUANTIZED`."""
    num_experts, num_outputs, num_inputs = out.shape
    outputs, inputs, warps = shape
    grid = (triton.cdiv(num_outputs, outputs), triton.cdiv(num_inputs, inputs), num_experts)
    with on_device(out):
        dequantize_mxfp4_kernel[grid](
            out,
            words,
            exponents,
            M=num_outputs,
            K=num_inputs,
            OUTPUTS=outputs,
            INPUTS=inputs,
            DOT_DTYPE=dot_dtype(out.dtype, out.dtype),
            num_warps=warps,
        )
