"""Merges the splits of latent decode and takes their sum to values, which else are two kernels.

A program's part of the matrix is in registers before the kernel ahead has ended: it does not depend on it.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.decode_kernel import merge_splits


@triton.jit(do_not_specialize=["num_splits", "wanted_splits", "most_tiles"])
def merge_values_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    num_splits: tl.tensor,
    wanted_splits: tl.tensor,
    most_tiles: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_mh: tl.tensor,
    stride_mv: tl.tensor,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `VALUES` values of one head of one sequence. Grid (tiles of values, Hq, B)."""
    head = tl.program_id(1).to(tl.int64)
    seq = tl.program_id(2).to(tl.int64)
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    column = tl.arange(0, R_PAD)
    cells = matrix_ptr + head * stride_mh + value[:, None] * stride_mv + column[None, :]
    matrix = tl.load(cells, mask=(value < V)[:, None] & (column < R)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    merged, _, _ = merge_splits(
        partial_ptr, partial_lse_ptr, tl.load(seq_lens_ptr + seq), None, seq * NUM_HEADS + head, num_splits,
        wanted_splits, most_tiles, R, R_PAD, BLOCK_N, MIN_TILES, SPLITS_PAD,
    )  # fmt: skip
    # Rounded as if the sum had been in memory.
    merged = merged.to(matrix_ptr.dtype.element_ty).to(tl.float32)
    product = tl.sum(matrix.to(tl.float32) * merged[None, :], axis=1)
    out_ptrs = out_ptr + seq * stride_ot + head * stride_oh + value
    tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=value < V)
