"""Products of a few rows with a matrix of each head: what takes queries to the latents' space, and sums back from it.

A program's part of the matrix is in registers before the kernel ahead has ended: it does not depend on it.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.errors import AttentionInputError
from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import check_device, dot_dtype, on_device

MAX_ROWS = 64
"""Rows that one tile holds; more are for the device's own library."""

_TILE = 8192
"""Numbers of a matrix that a program multiplies with."""


@triton.jit(do_not_specialize=["num_rows"])
def head_product_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride_xt: tl.tensor,
    stride_xh: tl.tensor,
    stride_mh: tl.tensor,
    stride_mk: tl.tensor,
    stride_mn: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `BLOCK_N` outputs of all rows in one head. Grid (tiles of outputs, heads)."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, K_PAD)
    row = tl.arange(0, ROWS)
    cells = matrix_ptr + head * stride_mh + k[:, None] * stride_mk + column[None, :] * stride_mn
    matrix = tl.load(cells, mask=(k < K)[:, None] & (column < N)[None, :], other=0.0).to(DOT_DTYPE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_cells = x_ptr + row[:, None].to(tl.int64) * stride_xt + head * stride_xh + k[None, :]
    x = tl.load(x_cells, mask=(row < num_rows)[:, None] & (k < K)[None, :], other=0.0).to(DOT_DTYPE)
    product = tl.dot(x, matrix, input_precision="ieee")
    out_cells = out_ptr + row[:, None].to(tl.int64) * stride_ot + head * stride_oh + column[None, :]
    stored = (row < num_rows)[:, None] & (column < N)[None, :]
    tl.store(out_cells, product.to(out_ptr.dtype.element_ty), mask=stored)


def head_product(x: torch.Tensor, matrices: torch.Tensor, output: torch.Tensor) -> None:
    """`output[b, h] = x[b, h] @ matrices[h]`, for at most `MAX_ROWS` rows.

    Args:
        x: (B, Hq, K); the elements of a head contiguous.
        matrices: (Hq, K, N) of the same dtype, in any order.
        output: (B, Hq, N), written; the elements of a head contiguous.

    Raises:
        AttentionInputError: shapes that do not fit each other or the kernel.
    """
    rows, heads, size = x.shape
    if matrices.shape[:2] != (heads, size) or output.shape != (rows, heads, matrices.shape[2]) or rows > MAX_ROWS:
        raise AttentionInputError(
            f"{tuple(x.shape)} times {tuple(matrices.shape)} into {tuple(output.shape)}: at most {MAX_ROWS} rows"
        )
    if x.stride(2) != 1 or output.stride(2) != 1:
        raise AttentionInputError("the elements of a head must be contiguous")
    check_device(x)
    if rows == 0:
        return
    outputs, padded = matrices.shape[2], max(16, triton.next_power_of_2(size))
    block = min(max(16, _TILE // padded), max(16, triton.next_power_of_2(outputs)))
    grid = (triton.cdiv(outputs, block), heads)
    with on_device(x):
        head_product_kernel[grid](
            output, x, matrices, rows, *x.stride()[:2], *matrices.stride(), *output.stride()[:2],
            K=size, K_PAD=padded, N=outputs, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_N=block,
            DOT_DTYPE=dot_dtype(x.dtype, x.dtype), num_warps=4,
            **dependent_launch(x.device, grid[0] * heads),
        )  # fmt: skip
