"""The kernel of `rms_norm` and `add_rms_norm`."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device

_TILE = 1024
"""Elements of the smallest tile: rows shorter than this share a program."""


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    num_rows: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    INNER: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `ROWS` rows of H, whole. Row r of x begins at `r // INNER` outer and `r % INNER` inner strides."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    mask = (row < num_rows)[:, None] & (column < H)[None, :]
    # Weights do not change while kernels run: they are fetched before the kernel that makes x has ended.
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_rows = (row // INNER) * stride_outer + (row % INNER) * stride_inner
    x = tl.load(x_ptr + x_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    contiguous = row[:, None] * H + column[None, :]
    if residual_ptr is not None:
        x += tl.load(residual_ptr + contiguous, mask=mask, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + contiguous, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    normalized = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + contiguous, normalized.to(out_ptr.dtype.element_ty), mask=mask)


def launch_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    """Normalise x, or `residual += x`, into `out`; see `workers.ops.rms_norm` for the arguments."""
    if x.numel() == 0:
        return
    hidden_size = x.shape[-1]
    if x.is_contiguous() or x.dim() > 3 or x.stride(-1) != 1:
        x = x.reshape(-1, hidden_size)
    inner = x.shape[-2] if x.dim() == 3 else 1
    stride_outer = x.stride(0) if x.dim() > 1 else 0
    block = triton.next_power_of_2(hidden_size)
    rows = max(1, _TILE // block)
    num_rows = x.numel() // hidden_size
    num_programs = triton.cdiv(num_rows, rows)
    with on_device(x):
        rms_norm_kernel[(num_programs,)](
            out,
            x,
            residual,
            weight,
            eps,
            num_rows,
            stride_outer,
            x.stride(-2) if x.dim() == 3 else 0,
            INNER=inner,
            H=hidden_size,
            BLOCK_H=block,
            ROWS=rows,
            num_warps=num_warps(block * rows),
            **dependent_launch(x.device, num_programs),
        )


def num_warps(tile: int) -> int:
    """Warps for a tile of that many elements: 16 elements a thread; never a matter of how many rows there are."""
    return min(max(tile // 512, 1), 16)
