"""A router of few tokens as one kernel: its map, and the choice by the program that is the last to bring logits.

Which program that is changes nothing: it reads what all of a token's programs wrote, and they are counted.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from workers.ops.router_config import RouterConfig
from workers.ops.triton.router_logits import MAX_SIZE, computes
from workers.ops.triton.routing import MAX_EXPERTS, route_token, routing_constants

MOST_TOKENS = 8
"""The more tokens, the more often a weight is read, and the longer one program chooses."""

_NUM_WARPS = 8


@triton.jit
def few_tokens_router_kernel(
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    correction_ptr: tl.tensor | None,
    stride_x: tl.tensor,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SMALLEST: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the logits of `EXPERTS` experts for one token, and of the last one the choice. Grid (parts, T)."""
    ALL: tl.constexpr = NUM_EXPERTS + 1 if GATED else NUM_EXPERTS
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    inside = expert < ALL
    column = tl.arange(0, BLOCK)
    weight_ptrs = weight_ptr + expert[:, None] * SIZE + column[None, :]
    weight = tl.load(weight_ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0).to(tl.float32)
    added = tl.zeros([EXPERTS], tl.float32)
    if bias_ptr is not None:
        added += tl.load(bias_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    token = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + token * stride_x + column, mask=column < SIZE, other=0.0).to(tl.float32)
    logits = tl.sum(weight * x[None, :], axis=1) + added
    tl.store(logits_ptr + token * ALL + expert, logits, mask=inside)
    tl.debug_barrier()  # all threads' logits are written before one of them counts the program
    before = tl.atomic_add(counters_ptr + token, 1, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(counters_ptr + token, 0)  # for the next launch, which waits for this one
        route_token(
            ids_ptr, weights_ptr, logits_ptr, correction_ptr, token,
            NUM_EXPERTS, PADDED_EXPERTS, TOP_K, PADDED_K, NUM_SHARED, GATED, KIND, RENORMALIZE,
            SMALLEST, SCALE, NUM_GROUPS, PADDED_GROUPS, PADDED_SIZE, TOP_K_GROUPS, SUM_OF_TWO,
        )  # fmt: skip


def routes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this kernel is made for such tokens and such a map."""
    return 0 < x.shape[0] <= MOST_TOKENS and weight.shape[0] <= MAX_EXPERTS and computes(x, weight)


def launch_few_tokens_router(
    ids: torch.Tensor,
    weights: torch.Tensor,
    counters: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: RouterConfig,
    correction_bias: torch.Tensor | None,
    num_shared: int = 0,
) -> None:
    """`launch_router_logits` and `launch_route` in one.

    Args:
        ids: (T, S + k) of an integer dtype, contiguous; written.
        weights: (T, S + k) float32, contiguous; written.
        counters: (`MOST_TOKENS`,) int32, all 0, and 0 again afterwards; of launches that wait for each other.
        x: (T, H), as `routes` says.
        weight: (E, H), contiguous; with a gate of the shared experts (E + 1, H).
        bias: (E,) or None.
        config: the family's router.
        correction_bias: (E,), contiguous, or None.
        num_shared: S experts before the E.
    """
    num_tokens, (rows, size) = x.shape[0], weight.shape
    logits = torch.empty(num_tokens, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    experts = max(1, MAX_SIZE // block)
    parts = triton.cdiv(rows, experts)
    with on_device(x):
        few_tokens_router_kernel[(parts, num_tokens)](
            ids,
            weights,
            logits,
            counters,
            x,
            weight,
            bias,
            correction_bias,
            x.stride(0),
            SIZE=size,
            EXPERTS=experts,
            BLOCK=block,
            **routing_constants(config, num_shared, rows > config.num_experts),
            num_warps=_NUM_WARPS,
            **dependent_launch(x.device, parts * num_tokens),
        )
