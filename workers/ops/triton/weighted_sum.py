"""The kernels of `workers.ops.weighted_sum`."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from workers.ops.triton.rms_norm import num_warps

_BLOCK, _NUM_WARPS = 1024, 4


@triton.jit
def _sum_rows(
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor | None,
    added_ptr: tl.tensor | None,
    token: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The columns of a token's sum, float32."""
    result = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + (token * TOP_K + i) * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is None:
            result += row
        else:
            result += row * tl.load(weights_ptr + token * TOP_K + i)
    if added_ptr is not None:
        result += tl.load(added_ptr + token * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def weighted_sum_kernel(
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor | None,
    added_ptr: tl.tensor | None,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `BLOCK` of the `SIZE` columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    result = _sum_rows(rows_ptr, weights_ptr, added_ptr, token, column, mask, SIZE, TOP_K, BLOCK)
    tl.store(out_ptr + token * SIZE + column, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_weighted_rms_norm_kernel(
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor | None,
    added_ptr: tl.tensor | None,
    residual_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: all `SIZE` columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    # Weights do not change while kernels run: they are fetched before the kernel that makes the rows has ended.
    norm = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = _sum_rows(rows_ptr, weights_ptr, added_ptr, token, column, mask, SIZE, TOP_K, BLOCK)
    cells = residual_ptr + token * SIZE + column
    total = total.to(rows_ptr.dtype.element_ty).to(tl.float32) + tl.load(cells, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(residual_ptr.dtype.element_ty)
    tl.store(cells, rounded, mask=mask)
    x = rounded.to(tl.float32)
    normalized = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * norm
    tl.store(out_ptr + token * SIZE + column, normalized.to(out_ptr.dtype.element_ty), mask=mask)


def launch_weighted_sum(
    out: torch.Tensor, rows: torch.Tensor, top_k: int, weights: torch.Tensor | None, added: torch.Tensor | None
) -> None:
    """Sum into `out`; all contiguous, the weights float32."""
    num_tokens, size = out.shape
    if out.numel() == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(size))
    with on_device(rows):
        grid = (num_tokens, triton.cdiv(size, block))
        weighted_sum_kernel[grid](
            out,
            rows,
            weights,
            added,
            SIZE=size,
            TOP_K=top_k,
            BLOCK=block,
            num_warps=_NUM_WARPS,
            **dependent_launch(rows.device, grid[0] * grid[1]),
        )


def launch_add_weighted_rms_norm(
    out: torch.Tensor,
    rows: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None,
    added: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    """Add the sum to `residual`, and write that normalised; all contiguous, `weights` float32."""
    num_tokens, size = out.shape
    if out.numel() == 0:
        return
    block = triton.next_power_of_2(size)
    with on_device(rows):
        add_weighted_rms_norm_kernel[(num_tokens,)](
            out,
            rows,
            weights,
            added,
            residual,
            norm,
            eps,
            SIZE=size,
            TOP_K=top_k,
            BLOCK=block,
            num_warps=num_warps(block),
            **dependent_launch(rows.device, num_tokens),
        )
