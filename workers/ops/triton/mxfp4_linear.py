"""Launches of the kernels that read weights in MXFP4: a grouped product, and the numbers in bfloat16."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import compiles_gluon, device_traits, dot_dtype, on_device
from workers.ops.mxfp4_tiles import Mxfp4Tile, choose_mxfp4_tile
from workers.ops.triton.mxfp4_numbers import mxfp4_factors, mxfp4_in_order
from workers.ops.triton.mxfp4_rows import mxfp4_rows_kernel

DEQUANTIZED = (32, 256, 4)
"""Outputs, inputs (at least 128) and warps of a program that dequantises; powers of two."""

_FEWEST_TILES = 64
"""Fewer are counted as fast, by the same compiled kernel."""


def computes_mxfp4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a device: bfloat16 on NVIDIA GPUs that multiply it outside of matrix instructions."""
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def mxfp4_tile(num_pairs: int, num_experts: int, gated: bool, x: torch.Tensor, alone: bool) -> Mxfp4Tile:
    """The table's tile for N pairs.

    Args:
        num_pairs: N.
        num_experts: E.
        gated: whether the weights are gate and up.
        x: as `launch_mxfp4_linear` takes it.
        alone: whether every pair is a tile, and none is sorted.
    """
    traits = device_traits(x.device)
    staying = not alone and compiles_gluon(traits) and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return choose_mxfp4_tile(num_pairs, num_experts, gated, traits.shared_memory, staying)


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
    num_tiles, num_experts, num_inputs = tiles.shape[-1], words.shape[0], x.shape[1]
    kind, alpha, limit = activation or (None, 0.0, 0.0)
    dependent = launches_dependents(x.device)
    arguments = (out, x, words, exponents, bias, pairs, tiles, num_tiles, x.stride(0))
    options: dict[str, Any] = {
        "NUM_EXPERTS": num_experts,
        "M": num_outputs,
        "K": num_inputs,
        "PAIRS_PER_ROW": pairs_per_row,
        "SPREAD": spread,
        "KIND": kind,
        "ALPHA": alpha,
        "LIMIT": limit,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "ROUTED_BEFORE": routed_before,
        "PDL": dependent,
        "num_warps": tile.num_warps,
        **({"launch_pdl": True} if dependent else {}),
    }
    blocks = num_tiles * triton.cdiv(num_outputs, tile.outputs)
    with on_device(x):
        if tile.staying:
            from workers.ops.triton.mxfp4_few_rows import INPUTS, mxfp4_few_rows_kernel

            mxfp4_few_rows_kernel[(min(blocks, tile.staying * device_traits(x.device).num_sms),)](
                *arguments,
                STAGES=max(2, min(tile.num_stages, num_inputs // INPUTS.value)),
                TILES=max(_FEWEST_TILES, triton.next_power_of_2(num_tiles)),
                **options,
            )
            return
        threads, parts = 32 * tile.num_warps, 1 if activation is None else 2
        mxfp4_rows_kernel[(blocks,)](
            *arguments,
            ALONE=pairs is None,
            INPUTS=tile.inputs,
            BUNDLE=tile.bundle,
            STAGES=tile.num_stages,
            PREFETCHED=min(tile.prefetched, words.shape[1], threads // parts),
            THREADS=threads,
            DOT_DTYPE=dot_dtype(x.dtype, x.dtype),
            **options,
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
