"""The kernel of `qk_norm_rope_`."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.fp8 import FP8_MAX
from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from attention.spec import FP8

if TYPE_CHECKING:
    from workers.ops.cache_write import CacheWrite

_HEADS = 16
"""Heads in a program; measured on an H200 with 32 + 8 heads of 128, for 1 to 8192 tokens."""

_FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit
def _store_half(ptrs: tl.tensor, values: tl.tensor, scale: tl.tensor, mask: tl.tensor, IS_FP8: tl.constexpr) -> None:
    """Write half heads, already rounded to the model's dtype, to the cache; to an FP8 cache divided by `scale`."""
    if IS_FP8:
        scaled = tl.math.div_rn(values.to(tl.float32), tl.broadcast_to(scale[:, None], values.shape))
        clamped = tl.clamp(scaled, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(ptrs, clamped.to(ptrs.dtype.element_ty), mask=mask)
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    weight_ptr: tl.tensor | None,
    cache_ptr: tl.tensor | None,
    slots_ptr: tl.tensor | None,
    eps: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    stride_position: tl.tensor,
    stride_block: tl.tensor,
    stride_kv: tl.tensor,
    stride_offset: tl.tensor,
    stride_kv_head: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `HEADS` heads of one token, as first and second halves. Value heads come only with a cache."""
    HALF: tl.constexpr = D // 2
    ROTATED: tl.constexpr = NUM_Q_HEADS + NUM_KV_HEADS
    NUM_HEADS: tl.constexpr = ROTATED if cache_ptr is None else ROTATED + NUM_KV_HEADS
    TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = (tl.program_id(0) // TILES).to(tl.int64)
    first_head = tl.program_id(0) % TILES * HEADS
    head = first_head + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_PADDED)
    in_head = (column < HALF)[None, :]
    rotated = (head < ROTATED)[:, None]

    ptrs = qkv_ptr + token * stride_token + head[:, None] * stride_head + column[None, :]
    mask = (head < NUM_HEADS)[:, None] & in_head
    first = tl.load(ptrs, mask=mask, other=0.0)
    second = tl.load(ptrs + HALF, mask=mask, other=0.0)
    angle_ptrs = cos_sin_ptr + tl.load(positions_ptr + token) * stride_position + column
    cosines = tl.load(angle_ptrs, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(angle_ptrs + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]

    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        weight_ptrs = weight_ptr + head[:, None] * D + column[None, :]
        a *= scale * tl.load(weight_ptrs, mask=rotated & in_head, other=0.0).to(tl.float32)
        b *= scale * tl.load(weight_ptrs + HALF, mask=rotated & in_head, other=0.0).to(tl.float32)
    first = tl.where(rotated, (a * cosines - b * sines).to(first.dtype), first)
    second = tl.where(rotated, (b * cosines + a * sines).to(second.dtype), second)
    tl.store(ptrs, first, mask=rotated & in_head)
    tl.store(ptrs + HALF, second, mask=rotated & in_head)

    if cache_ptr is not None and first_head + HEADS > NUM_Q_HEADS:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            is_value = (head >= ROTATED).to(tl.int32)
            kv_head = head - NUM_Q_HEADS - is_value * NUM_KV_HEADS
            rows = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_offset
            rows += is_value * stride_kv + kv_head * stride_kv_head
            cache_ptrs = cache_ptr + rows[:, None] + column[None, :]
            kv_scale = tl.where(is_value != 0, v_scale, k_scale)
            mask &= (head >= NUM_Q_HEADS)[:, None]
            _store_half(cache_ptrs, first, kv_scale, mask, IS_FP8)
            _store_half(cache_ptrs + HALF, second, kv_scale, mask, IS_FP8)


def launch_qk_norm_rope(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    cache: CacheWrite | None,
) -> None:
    """Normalise, rotate and store; see `workers.ops.qk_norm_rope` for the arguments."""
    num_tokens, _, head_size = qkv.shape
    if num_tokens == 0:
        return
    num_heads = num_q_heads + num_kv_heads * (1 if cache is None else 2)
    num_programs = num_tokens * triton.cdiv(num_heads, _HEADS)
    half = triton.next_power_of_2(head_size // 2)
    scales = (1.0, 1.0) if cache is None else (cache.scales.k, cache.scales.v)
    with on_device(qkv):
        qk_norm_rope_kernel[(num_programs,)](
            qkv,
            positions,
            cos_sin,
            norm_weight,
            None if cache is None else cache.kv_cache,
            None if cache is None else cache.slot_mapping,
            eps,
            *scales,
            qkv.stride(0),
            qkv.stride(1),
            cos_sin.stride(0),
            *((0, 0, 0, 0) if cache is None else cache.kv_cache.stride()[:4]),
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            D=head_size,
            HALF_PADDED=half,
            BLOCK_SIZE=1 if cache is None else cache.kv_cache.shape[2],
            HEADS=_HEADS,
            IS_FP8=cache is not None and cache.kv_cache.dtype == FP8,
            num_warps=num_warps(_HEADS * half),
            **dependent_launch(qkv.device, num_programs),
        )


def num_warps(half_tile: int) -> int:
    """Warps for so many elements of half heads: 8 elements a thread, one 16-byte load of a 16-bit dtype."""
    return min(max(half_tile // 256, 1), 8)
