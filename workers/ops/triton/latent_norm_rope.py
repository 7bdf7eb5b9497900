"""The kernel of `latent_norm_rope_`."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from attention.ops.triton.reshape_and_cache import to_stored
from workers.ops.cache_write import CacheWrite

_HEADS = 16
"""Heads of a program: as many as DeepSeek-V2-Lite has."""


@triton.jit
def _turn(
    rows: tl.tensor,
    mask: tl.tensor,
    cosines: tl.tensor | None,
    sines: tl.tensor | None,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Rotate rows of `2 * HALF` in place: (offsets of first, of second, first, second)."""
    pair = tl.arange(0, HALF_PADDED)[None, :]
    inside = mask & (pair < HALF)
    if INTERLEAVED:
        first_at, second_at = 2 * pair, 2 * pair + 1
    else:
        first_at, second_at = pair, pair + HALF
    first = tl.load(rows + first_at, mask=inside, other=0.0)
    second = tl.load(rows + second_at, mask=inside, other=0.0)
    if cosines is not None:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        turned = a * cosines - b * sines
        second = (b * cosines + a * sines).to(first.dtype)
        first = turned.to(first.dtype)
        tl.store(rows + first_at, first, mask=inside)
        tl.store(rows + second_at, second, mask=inside)
    return first_at, second_at, first, second


@triton.jit
def latent_norm_rope_kernel(
    query_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    cache_ptr: tl.tensor | None,
    slots_ptr: tl.tensor | None,
    eps: tl.tensor,
    scale: tl.tensor,
    stride_qt: tl.tensor,
    stride_qh: tl.tensor,
    stride_lt: tl.tensor,
    stride_position: tl.tensor,
    stride_block: tl.tensor,
    stride_slot: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one token's latent and rotary key, or `HEADS` of its query heads.

    Grid (T times one and the tiles of heads,).
    """
    PARTS: tl.constexpr = 1 + (NUM_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    column = tl.arange(0, R_PAD)
    weight = tl.load(weight_ptr + column, mask=(column < R) & (part == 0), other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    cosines = None
    sines = None
    if cos_sin_ptr is not None:
        pair = tl.arange(0, HALF_PADDED)
        angles = cos_sin_ptr + tl.load(positions_ptr + token) * stride_position + pair
        cosines = tl.load(angles, mask=pair < HALF, other=1.0).to(tl.float32)[None, :]
        sines = tl.load(angles + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if part > 0:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        rows = query_ptr + token * stride_qt + head[:, None] * stride_qh + NOPE
        _turn(rows, (head < NUM_HEADS)[:, None], cosines, sines, HALF, HALF_PADDED, INTERLEAVED)
        return
    row = latent_ptr + token * stride_lt
    x = tl.load(row + column, mask=column < R, other=0.0)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / R + eps) * weight
    x = wide.to(x.dtype)
    tl.store(row + column, x, mask=column < R)
    only = tl.arange(0, 1)[:, None]
    first_at, second_at, first, second = _turn(
        row + R + only, only == 0, cosines, sines, HALF, HALF_PADDED, INTERLEAVED
    )
    if cache_ptr is not None:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            stored = cache_ptr + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
            dtype: tl.constexpr = cache_ptr.dtype.element_ty
            tl.store(stored + column, to_stored(x, scale, dtype), mask=column < R)
            tl.store(stored + R + first_at, to_stored(first, scale, dtype), mask=first_at < 2 * HALF)
            tl.store(stored + R + second_at, to_stored(second, scale, dtype), mask=second_at < 2 * HALF)
            if REST > 0:  # of a rotary key that turns in part
                rest_at = 2 * HALF + tl.arange(0, REST_PADDED)
                rest = tl.load(row + R + rest_at, mask=rest_at < 2 * HALF + REST, other=0.0)
                tl.store(stored + R + rest_at, to_stored(rest, scale, dtype), mask=rest_at < 2 * HALF + REST)


def launch_latent_norm_rope(
    query: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    cache: CacheWrite | None,
    interleaved: bool = False,
) -> None:
    """Normalise, rotate and store; see `workers.ops.latent_norm_rope` for the arguments."""
    num_tokens, num_heads, head_size = query.shape
    if num_tokens == 0:
        return
    rank = norm_weight.shape[0]
    rotary = latent.shape[1] - rank
    turned = rotary // 2 * 2 if cos_sin is None else cos_sin.shape[1]
    rank_padded = triton.next_power_of_2(rank)
    num_programs = num_tokens * (1 + triton.cdiv(num_heads, _HEADS))
    with on_device(query):
        latent_norm_rope_kernel[(num_programs,)](
            query,
            latent,
            positions,
            cos_sin,
            norm_weight,
            None if cache is None else cache.kv_cache,
            None if cache is None else cache.slot_mapping,
            eps,
            1.0 if cache is None else cache.scales.k,
            query.stride(0),
            query.stride(1),
            latent.stride(0),
            0 if cos_sin is None else cos_sin.stride(0),
            *((0, 0) if cache is None else cache.kv_cache.stride()[:2]),
            NUM_HEADS=num_heads,
            NOPE=head_size - rotary,
            R=rank,
            R_PAD=rank_padded,
            HALF=turned // 2,
            HALF_PADDED=triton.next_power_of_2(turned // 2),
            REST=rotary - turned,
            REST_PADDED=triton.next_power_of_2(rotary - turned),
            BLOCK_SIZE=1 if cache is None else cache.kv_cache.shape[1],
            HEADS=_HEADS,
            INTERLEAVED=interleaved,
            num_warps=min(4, max(1, rank_padded // 256)),
            **dependent_launch(query.device, num_programs),
        )
