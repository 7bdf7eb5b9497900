"""Storing new keys and values in the paged cache."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.errors import AttentionInputError
from attention.fp8 import quantize
from attention.kv_cache import check_slots
from attention.ops.triton.launch import check_cache, check_device, check_span, device_traits, kernel_view, on_device

_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def to_stored(x: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """What a cache of `DTYPE` keeps of x: FP8 divided by the scale, and clamped to its range."""
    if tl.float8e4nv == DTYPE:
        x = tl.div_rn(x.to(tl.float32), scale)  # a plain division is approximate: another code at a tie
        x = tl.clamp(x, -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def _reshape_and_cache_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    stride_kt: tl.tensor,
    stride_kh: tl.tensor,
    stride_vt: tl.tensor,
    stride_vh: tl.tensor,
    stride_block: tl.tensor,
    stride_slot: tl.tensor,
    stride_head: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program: all heads of one token. Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, HEADS_PAD)[:, None]
    columns = tl.arange(0, D_PAD)[None, :]
    mask = (heads < HEADS) & (columns < D)
    key = tl.load(key_ptr + token * stride_kt + heads * stride_kh + columns, mask=mask)
    value = tl.load(value_ptr + token * stride_vt + heads * stride_vh + columns, mask=mask)
    stored = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot + heads * stride_head + columns
    tl.store(k_cache_ptr + stored, to_stored(key, k_scale, k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + stored, to_stored(value, v_scale, v_cache_ptr.dtype.element_ty), mask=mask)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write each token's key and value into its slot of one layer's cache.

    Args:
        key: (T, Hkv, D) of the cache's dtype, or any floating dtype for an FP8 cache; may be a strided view.
        value: (T, Hkv, D) likewise.
        kv_cache: (num_blocks, 2, block_size, Hkv, D), written; float8_e4m3fn holds `x / scale`, clamped to ±448.
        slot_mapping: (T,) int64, `block * block_size + offset`; a negative one skips its token.
        k_scale: keys are divided by it in an FP8 cache.
        v_scale: values likewise.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    check_cache(kv_cache)
    check_device(kv_cache)
    num_kv_heads, head_size = kv_cache.shape[3:]
    if key.shape != value.shape or key.shape[1:] != kv_cache.shape[3:] or key.stride(2) != 1 or value.stride(2) != 1:
        raise AttentionInputError(
            f"keys of shape {tuple(key.shape)} and values of {tuple(value.shape)} for a cache of {num_kv_heads} heads "
            f"of {head_size}: needs (tokens, heads, head size), the elements of a head contiguous"
        )
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    if not fp8 and not key.dtype == value.dtype == kv_cache.dtype:
        raise AttentionInputError(f"keys of {key.dtype} and values of {value.dtype} for a cache of {kv_cache.dtype}")
    tokens = key.shape[0]
    check_slots(slot_mapping, tokens)
    if tokens == 0:
        return
    check_span("a token's keys", key, 2)
    check_span("a token's values", value, 2)
    if fp8 and not device_traits(kv_cache.device).converts_e4m3:
        key, value = _e4m3_bytes(key, k_scale), _e4m3_bytes(value, v_scale)
    cache = kernel_view(kv_cache)
    heads_padded, head_size_padded = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_size)
    with on_device(kv_cache):
        _reshape_and_cache_kernel[(tokens,)](
            key, value, cache[:, 0], cache[:, 1], slot_mapping, k_scale, v_scale,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            kv_cache.stride(0), kv_cache.stride(2), kv_cache.stride(3),
            HEADS=num_kv_heads, HEADS_PAD=heads_padded, D=head_size, D_PAD=head_size_padded,
            BLOCK_SIZE=kv_cache.shape[2], num_warps=min(8, max(1, heads_padded * head_size_padded // 256)),
        )  # fmt: skip


def _e4m3_bytes(x: torch.Tensor, scale: float) -> torch.Tensor:
    """`x / scale` in e4m3, as bytes, converted by PyTorch."""
    return quantize(x, scale).view(torch.uint8)
