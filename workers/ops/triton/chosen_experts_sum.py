"""The kernel of the experts' second product for single tokens, with the sum over a token's experts in it.

Of one token every chosen expert has one row: there is nothing to share, and a program that goes through all of them
for its outputs sums up in registers, in the order of the experts, and rounds once.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import launches_dependents
from attention.ops.triton.launch import on_device
from workers.ops.sum_tiles import USUAL, SumTile
from workers.ops.triton.prefetch_rows import prefetch_rows, prefetched_bytes


@triton.jit
def chosen_experts_sum_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor | None,
    added_ptr: tl.tensor | None,
    NUM_EXPERTS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `OUTPUTS` of the `M` columns of one token's result.

    The experts were chosen before the kernel ahead waited for its own predecessor: they are known while it runs.
    """
    STEPS: tl.constexpr = (K + INPUTS - 1) // INPUTS
    first = tl.program_id(0) * OUTPUTS
    token = tl.program_id(1).to(tl.int64)
    if PDL:
        if PREFETCHED > 0:
            for i in tl.static_range(TOP_K):
                likely = tl.load(ids_ptr + token * TOP_K + i, cache_modifier=".cg").to(tl.int32)
                if likely < NUM_EXPERTS and likely >= 0 and first + OUTPUTS <= M:
                    own_ptr = weight_ptr + likely.to(tl.int64) * (M * K)
                    prefetch_rows(own_ptr, first, M, K, OUTPUTS, 1, PREFETCHED, THREADS)
        gdc_wait()
        gdc_launch_dependents()
    feature = first + tl.arange(0, OUTPUTS)
    inside = feature < M
    column = tl.arange(0, INPUTS)
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for step in tl.range(0, TOP_K * STEPS, num_stages=STAGES):
        pair = token * TOP_K + step // STEPS
        begin = step % STEPS * INPUTS
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        there = begin + column < K
        x = tl.load(x_ptr + pair * K + begin + column, mask=there, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + pair)
        rows = weight_ptr + (expert * M + feature)[:, None] * K
        weight = tl.load(rows + (begin + column)[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        total += weight.to(tl.float32) * x[None, :]
    result = tl.sum(total, axis=1)
    if bias_ptr is not None:
        for i in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + token * TOP_K + i).to(tl.int64)
            added = tl.load(bias_ptr + expert * M + feature, mask=inside, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                added *= tl.load(weights_ptr + token * TOP_K + i)
            result += added
    if added_ptr is not None:
        result += tl.load(added_ptr + token * M + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * M + feature, result.to(out_ptr.dtype.element_ty), mask=inside)


def launch_chosen_experts_sum(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    tile: SumTile = USUAL,
) -> None:
    """`sum_j weights[t, j] * (weight[ids[t, j]] @ x[t * k + j] + bias[ids[t, j]])` into `out`.

    Args:
        out: (T, M), contiguous.
        x: (T * k, K), contiguous.
        weight: (E, M, K), contiguous.
        ids: (T, k) of an integer dtype, contiguous.
        weights: (T, k) float32, contiguous; None: all 1.
        bias: (E, M), contiguous, or None.
        added: (T, M), contiguous, added to the sum; or None.
        tile: the launch's shape.
    """
    num_experts, num_outputs, num_inputs = weight.shape
    num_tokens, top_k = ids.shape
    if out.numel() == 0:
        return
    dependent = launches_dependents(x.device)
    threads = 32 * tile.num_warps
    with on_device(x):
        chosen_experts_sum_kernel[(triton.cdiv(num_outputs, tile.outputs), num_tokens)](
            out,
            x,
            weight,
            bias,
            ids,
            weights,
            added,
            NUM_EXPERTS=num_experts,
            M=num_outputs,
            K=num_inputs,
            TOP_K=top_k,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            STAGES=tile.num_stages,
            PREFETCHED=prefetched_bytes(tile.prefetched, num_inputs * weight.element_size(), tile.outputs, threads),
            THREADS=threads,
            PDL=dependent,
            num_warps=tile.num_warps,
            **({"launch_pdl": True} if dependent else {}),
        )
