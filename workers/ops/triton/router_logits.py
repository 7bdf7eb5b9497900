"""The kernels of a router's map, whose logits are float32 whatever the dtypes.

For few tokens: a program has its rows of the weight in registers before the tokens are there, and multiplies without
tensor cores. For more: products in bfloat16 with float32 sums, of a float32 weight as three bfloat16 summands (the
first, the rest, and its rest), which together are the weight. Where even so there are few programs, each warp of one
sums over a part of H, because a program takes as long as its steps follow each other. Of each of the three a token's
logits do not depend on the batch.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import INTERPRETED, on_device

FEW_TOKENS = 64
"""Up to which the first kernel is used: above it reads the weight too often."""

PARTED_TOKENS = 1024
"""Up to which the kernel with parts is used: above it there are enough programs."""

MAX_SIZE = 8192
"""Numbers of the weight that a program has in its registers: the largest H."""

_TOKENS, _NUM_WARPS = 4, 8


@triton.jit(do_not_specialize=["num_tokens"])
def few_tokens_kernel(
    logits_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the logits of `EXPERTS` experts for `TOKENS` tokens."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    inside = expert < NUM_EXPERTS
    column = tl.arange(0, BLOCK)
    weight_ptrs = weight_ptr + expert[:, None] * SIZE + column[None, :]
    weight = tl.load(weight_ptrs, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0).to(tl.float32)
    added = tl.zeros([EXPERTS], tl.float32)
    if bias_ptr is not None:
        added += tl.load(bias_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(1) * TOKENS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in tl.static_range(TOKENS):
        token = first + i
        row = x_ptr + tl.cast(token, tl.int64) * stride_x
        x = tl.load(row + column, mask=(column < SIZE) & (token < num_tokens), other=0.0).to(tl.float32)
        logits = tl.sum(weight * x[None, :], axis=1) + added
        tl.store(logits_ptr + token * NUM_EXPERTS + expert, logits, mask=inside & (token < num_tokens))


@triton.jit
def _add_product(sums: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """`sums + x @ weight`, with a float32 weight as three summands of x's dtype where that is another."""
    part = weight.to(x.dtype)
    sums = tl.dot(x, part, sums, input_precision="ieee")
    if weight.dtype == tl.float32 and x.dtype != tl.float32:
        rest = weight - part.to(tl.float32)
        part = rest.to(x.dtype)
        sums = tl.dot(x, part, sums)
        sums = tl.dot(x, (rest - part.to(tl.float32)).to(x.dtype), sums)
    return sums


@triton.jit
def _store(
    logits_ptr: tl.tensor,
    logits: tl.tensor,
    bias_ptr: tl.tensor | None,
    token: tl.tensor,
    there: tl.tensor,
    expert: tl.tensor,
    inside: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
) -> None:
    """Add the bias, and write the logits of tokens that are `there` for experts that are `inside`."""
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = logits_ptr + token[:, None].to(tl.int64) * NUM_EXPERTS + expert[None, :]
    tl.store(places, logits, mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def many_tokens_kernel(
    logits_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the logits of `EXPERTS` experts for `TOKENS` tokens."""
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    inside = expert < NUM_EXPERTS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    column = tl.arange(0, INPUTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * stride_x + column[None, :]
    weight_ptrs = weight_ptr + expert[None, :] * SIZE + column[:, None]
    logits = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for begin in tl.range(0, SIZE, INPUTS, num_stages=STAGES):
        within = begin + column < SIZE
        x = tl.load(x_ptrs + begin, mask=there[:, None] & within[None, :], other=0.0).to(DOT_DTYPE)
        weight = tl.load(weight_ptrs + begin, mask=inside[None, :] & within[:, None], other=0.0)
        logits = _add_product(logits, x, weight)
    _store(logits_ptr, logits, bias_ptr, token, there, expert, inside, NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def parted_kernel(
    logits_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the logits of `EXPERTS` experts for `TOKENS` tokens, as sums of `PARTS` parts of the `SIZE` columns.

    The parts take turns at `INPUTS` columns each, and are summed up in a fixed order.
    """
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    inside = expert < NUM_EXPERTS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    column = tl.arange(0, PARTS)[:, None] * INPUTS + tl.arange(0, INPUTS)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_ptrs = x_ptr + token[None, :, None].to(tl.int64) * stride_x + column[:, None, :]
    weight_ptrs = weight_ptr + expert[None, None, :] * SIZE + column[:, :, None]
    sums = tl.zeros([PARTS, TOKENS, EXPERTS], tl.float32)
    for begin in tl.range(0, SIZE, PARTS * INPUTS):
        within = begin + column < SIZE
        x = tl.load(x_ptrs + begin, mask=there[None, :, None] & within[:, None, :], other=0.0).to(DOT_DTYPE)
        weight = tl.load(weight_ptrs + begin, mask=inside[None, None, :] & within[:, :, None], other=0.0)
        sums = _add_product(sums, x, weight)
    logits = tl.sum(sums, axis=0)
    _store(logits_ptr, logits, bias_ptr, token, there, expert, inside, NUM_EXPERTS)


def computes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these kernels are made for such a map: rows of bfloat16, a weight of bfloat16 or float32."""
    exact = x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32)
    return exact and weight.shape[1] <= MAX_SIZE and x.stride(1) == 1


def launch_router_logits(
    logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """`x @ weight.T + bias` into `logits`.

    Args:
        logits: (T, E) float32, contiguous.
        x: (T, H), the elements of a row contiguous.
        weight: (E, H), contiguous; with x as `computes` says.
        bias: (E,) or None.
    """
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return
    size = weight.shape[1]
    with on_device(x):
        if num_tokens <= FEW_TOKENS:
            block = triton.next_power_of_2(size)
            experts = max(1, MAX_SIZE // block)
            grid = (triton.cdiv(num_experts, experts), triton.cdiv(num_tokens, _TOKENS))
            few_tokens_kernel[grid](
                logits,
                x,
                weight,
                bias,
                num_tokens,
                x.stride(0),
                NUM_EXPERTS=num_experts,
                SIZE=size,
                EXPERTS=experts,
                TOKENS=_TOKENS,
                BLOCK=block,
                num_warps=_NUM_WARPS,
                **dependent_launch(x.device, grid[0] * grid[1]),
            )
            return
        common = {
            "NUM_EXPERTS": num_experts,
            "SIZE": size,
            "INPUTS": 64,
            "DOT_DTYPE": tl.float32 if INTERPRETED else tl.bfloat16,
        }
        parted = num_tokens <= PARTED_TOKENS
        tokens, experts = (16, 16) if parted else (64, 64)
        grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(num_experts, experts))
        dependent = dependent_launch(x.device, grid[0] * grid[1])
        arguments = (logits, x, weight, bias, num_tokens, x.stride(0))
        if parted:
            parts = 8 if weight.dtype == torch.float32 else 4
            parted_kernel[grid](
                *arguments, EXPERTS=experts, TOKENS=tokens, PARTS=parts, num_warps=parts, **common, **dependent
            )
            return
        many_tokens_kernel[grid](
            *arguments, EXPERTS=experts, TOKENS=tokens, STAGES=4, num_warps=4, **common, **dependent
        )
