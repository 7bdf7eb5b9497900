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
def _load_pairs(
    rows: tl.tensor, mask: tl.tensor, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second dimensions of the pairs of heads that begin at `rows` (H, 1), each (H, HALF_PADDED)."""
    if INTERLEAVED:  # contiguous loads, and a thread has both of a pair
        column = tl.arange(0, 2 * HALF_PADDED)[None, :]
        both = tl.load(rows + column, mask=mask & (column < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], HALF_PADDED, 2)))
    else:
        column = tl.arange(0, HALF_PADDED)[None, :]
        first = tl.load(rows + column, mask=mask & (column < HALF), other=0.0)
        second = tl.load(rows + column + HALF, mask=mask & (column < HALF), other=0.0)
    return first, second


@triton.jit
def _store(ptrs: tl.tensor, values: tl.tensor, scale: tl.tensor | None, mask: tl.tensor) -> None:
    """Write values, already rounded to the model's dtype; to an FP8 cache divided by `scale`."""
    if scale is not None:
        scaled = tl.math.div_rn(values.to(tl.float32), tl.broadcast_to(scale, values.shape))
        clamped = tl.clamp(scaled, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(ptrs, clamped.to(ptrs.dtype.element_ty), mask=mask)
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def _store_pairs(
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    scale: tl.tensor | None,
    mask: tl.tensor,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Write what `_load_pairs` loads."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF_PADDED)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF_PADDED))
        _store(rows + column, both, scale, mask & (column < 2 * HALF))
    else:
        column = tl.arange(0, HALF_PADDED)[None, :]
        _store(rows + column, first, scale, mask & (column < HALF))
        _store(rows + column + HALF, second, scale, mask & (column < HALF))


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor | None,
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
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    ANGLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `HEADS` heads of one token, as pairs of dimensions. Value heads come only with a cache.

    `HALF` pairs are held, of which the first `ANGLES` turn: all of them where halves are rotated, and beside them the
    rest of a head that is rotated in part. Of interleaved pairs all are held, and the last turn by nothing.
    """
    REST: tl.constexpr = D - 2 * HALF
    ROTATED: tl.constexpr = NUM_Q_HEADS + NUM_KV_HEADS
    NUM_HEADS: tl.constexpr = ROTATED if cache_ptr is None else ROTATED + NUM_KV_HEADS
    TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = (tl.program_id(0) // TILES).to(tl.int64)
    first_head = tl.program_id(0) % TILES * HEADS
    head = first_head + tl.arange(0, HEADS)
    rotated = (head < ROTATED)[:, None]
    mask = (head < NUM_HEADS)[:, None]

    rows = qkv_ptr + token * stride_token + head[:, None] * stride_head
    first, second = _load_pairs(rows, mask, HALF, HALF_PADDED, INTERLEAVED)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if REST:
        rest_column = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        rest = tl.load(rows + rest_column, mask=mask & (rest_column < D), other=0.0)

    if weight_ptr is not None:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if REST:
            r = rest.to(tl.float32)
            squares += tl.sum(r * r, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        weight_rows = weight_ptr + head[:, None] * D
        first_weight, second_weight = _load_pairs(weight_rows, rotated, HALF, HALF_PADDED, INTERLEAVED)
        a *= scale * first_weight.to(tl.float32)
        b *= scale * second_weight.to(tl.float32)
        if REST:
            rest_weight = tl.load(weight_rows + rest_column, mask=rotated & (rest_column < D), other=0.0)
            rest = tl.where(rotated, (r * scale * rest_weight.to(tl.float32)).to(rest.dtype), rest)
            tl.store(rows + rest_column, rest, mask=rotated & (rest_column < D))
    if cos_sin_ptr is not None:
        pair = tl.arange(0, HALF_PADDED)
        angle_ptrs = cos_sin_ptr + tl.load(positions_ptr + token) * stride_position + pair
        cosines = tl.load(angle_ptrs, mask=pair < ANGLES, other=1.0).to(tl.float32)[None, :]
        sines = tl.load(angle_ptrs + ANGLES, mask=pair < ANGLES, other=0.0).to(tl.float32)[None, :]
        turned = a * cosines - b * sines
        b = b * cosines + a * sines
        a = turned
    if cos_sin_ptr is not None or weight_ptr is not None:
        first = tl.where(rotated, a.to(first.dtype), first)
        second = tl.where(rotated, b.to(second.dtype), second)
        _store_pairs(rows, first, second, None, rotated, HALF, HALF_PADDED, INTERLEAVED)

    if cache_ptr is not None and first_head + HEADS > NUM_Q_HEADS:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            is_value = (head >= ROTATED).to(tl.int32)
            kv_head = head - NUM_Q_HEADS - is_value * NUM_KV_HEADS
            offsets = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_offset
            offsets += is_value * stride_kv + kv_head * stride_kv_head
            cache_rows = cache_ptr + offsets[:, None]
            kv_scale = tl.where(is_value != 0, v_scale, k_scale)[:, None] if IS_FP8 else None
            mask &= (head >= NUM_Q_HEADS)[:, None]
            _store_pairs(cache_rows, first, second, kv_scale, mask, HALF, HALF_PADDED, INTERLEAVED)
            if REST:
                _store(cache_rows + rest_column, rest, kv_scale, mask & (rest_column < D))


def launch_qk_norm_rope(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    cache: CacheWrite | None,
    interleaved: bool = False,
) -> None:
    """Normalise, rotate and store; see `workers.ops.qk_norm_rope` for the arguments."""
    num_tokens, _, head_size = qkv.shape
    if num_tokens == 0:
        return
    num_heads = num_q_heads + num_kv_heads * (1 if cache is None else 2)
    num_programs = num_tokens * triton.cdiv(num_heads, _HEADS)
    angles = head_size // 2 if cos_sin is None else cos_sin.shape[1] // 2
    half = head_size // 2 if interleaved else angles
    half_padded = triton.next_power_of_2(half)
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
            0 if cos_sin is None else cos_sin.stride(0),
            *((0, 0, 0, 0) if cache is None else cache.kv_cache.stride()[:4]),
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            D=head_size,
            HALF=half,
            HALF_PADDED=half_padded,
            REST_PADDED=triton.next_power_of_2(head_size - 2 * half),
            ANGLES=angles,
            INTERLEAVED=interleaved,
            BLOCK_SIZE=1 if cache is None else cache.kv_cache.shape[2],
            HEADS=_HEADS,
            IS_FP8=cache is not None and cache.kv_cache.dtype == FP8,
            num_warps=num_warps(_HEADS * half_padded),
            **dependent_launch(qkv.device, num_programs),
        )


def num_warps(half_tile: int) -> int:
    """Warps for so many elements of half heads: 8 elements a thread, one 16-byte load of a 16-bit dtype."""
    return min(max(half_tile // 256, 1), 8)
