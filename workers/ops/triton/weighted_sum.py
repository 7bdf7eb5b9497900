"""The kernel of `workers.layers.moe.weighted_sum`."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device

_BLOCK, _NUM_WARPS = 1024, 4


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
    result = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + (token * TOP_K + i) * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is None:
            result += row
        else:
            result += row * tl.load(weights_ptr + token * TOP_K + i)
    if added_ptr is not None:
        result += tl.load(added_ptr + token * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, result.to(out_ptr.dtype.element_ty), mask=mask)


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
