"""The kernel of `skinny_linear` and `skinny_gated_linear`."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import dot_dtype, on_device
from workers.ops.skinny_tiles import SkinnyTile
from workers.ops.triton.prefetch_rows import prefetch_rows, prefetched_bytes


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor | None,
    num_rows: tl.tensor,
    stride_out: tl.tensor,
    stride_x: tl.tensor,
    stride_residual: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    THREADS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `FEATURES` of the `N` columns of the result, for all rows and one of `SPLITS` parts of the inputs.

    The rows of the weight are those of the matrix instruction, the rows of x its columns. Row r of the result of part s
    is row `r * SPLITS + s` of `out_ptr`.
    """
    SHARE: tl.constexpr = K // SPLITS
    first = tl.program_id(0) // SPLITS * FEATURES
    split = tl.program_id(0) % SPLITS
    weight_ptr += split * SHARE
    x_ptr += split * SHARE
    if PDL:  # weights do not change while kernels run: they are fetched before the kernel that makes x has ended
        if PREFETCHED > 0:
            prefetch_rows(weight_ptr, first, N, K, FEATURES, 2 if GATED else 1, PREFETCHED, THREADS)
        gdc_launch_dependents()
        gdc_wait()
    feature = first + tl.arange(0, FEATURES)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, INPUTS)
    weight_ptrs = weight_ptr + feature[:, None].to(tl.int64) * K + column[None, :]
    x_ptrs = x_ptr + row[None, :] * stride_x + column[:, None]
    there = (row < num_rows)[None, :]
    result = tl.zeros([FEATURES, ROWS], tl.float32)
    up = tl.zeros([FEATURES, ROWS], tl.float32)
    for begin in tl.range(0, SHARE, INPUTS, num_stages=STAGES):
        x = tl.load(x_ptrs + begin, mask=there, other=0.0).to(DOT_DTYPE)
        weight = tl.load(weight_ptrs + begin).to(DOT_DTYPE)
        result = tl.dot(weight, x, result, input_precision="ieee")
        if GATED:
            up_weight = tl.load(weight_ptrs + N * K + begin).to(DOT_DTYPE)
            up = tl.dot(up_weight, x, up, input_precision="ieee")
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature).to(tl.float32)
        result += tl.where(split == 0, bias, 0.0)[:, None]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row[None, :] * stride_residual + feature[:, None]
        result += tl.load(residual_ptrs, mask=there, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (row * SPLITS + split)[None, :] * stride_out + feature[:, None]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there)


def launch_skinny_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: SkinnyTile,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> None:
    """Multiply into `out`, of as many rows for each of x's as the tile has splits; see `workers.ops.skinny_linear`."""
    num_rows, num_features = x.shape[0], out.shape[1]
    if num_rows == 0:
        return
    threads = 32 * tile.num_warps
    row_bytes = weight.shape[1] // tile.splits * weight.element_size()
    dependent = launches_dependents(x.device)
    with on_device(x):
        skinny_linear_kernel[(num_features // tile.features * tile.splits,)](
            out,
            x,
            weight,
            bias,
            residual,
            num_rows,
            out.stride(0),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            N=num_features,
            K=weight.shape[1],
            GATED=gated,
            ROWS=tile.rows,
            SPLITS=tile.splits,
            FEATURES=tile.features,
            INPUTS=tile.inputs,
            STAGES=tile.num_stages,
            PREFETCHED=prefetched_bytes(tile.prefetched, row_bytes, tile.features * (2 if gated else 1), threads),
            THREADS=threads,
            DOT_DTYPE=dot_dtype(x.dtype, weight.dtype),
            PDL=dependent,
            num_warps=tile.num_warps,
            **({"launch_pdl": True} if dependent else {}),
        )
