"""Storing new latents and rotary keys in the paged cache."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.errors import AttentionInputError
from attention.kv_cache import check_slots
from attention.ops.triton.launch import check_device, check_span, on_device
from attention.ops.triton.reshape_and_cache import to_stored


@triton.jit
def _concat_and_cache_kernel(
    latent_ptr: tl.tensor,
    rotary_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    scale: tl.tensor,
    stride_lt: tl.tensor,
    stride_rt: tl.tensor,
    stride_block: tl.tensor,
    stride_slot: tl.tensor,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program: one token. Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    row = cache_ptr + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    column = tl.arange(0, R_PAD)
    latent = tl.load(latent_ptr + token * stride_lt + column, mask=column < R)
    tl.store(row + column, to_stored(latent, scale, dtype), mask=column < R)
    column = tl.arange(0, P_PAD)
    rotary = tl.load(rotary_ptr + token * stride_rt + column, mask=column < P)
    tl.store(row + R + column, to_stored(rotary, scale, dtype), mask=column < P)


def concat_and_cache_mla(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, scale: float = 1.0
) -> None:
    """`attention.kv_cache.concat_and_cache_mla` in one kernel; arguments as there, rows may be strided.

    Raises:
        AttentionInputError: arguments that do not fit each other or the kernel.
    """
    tokens, rank, rotary = kv_c.shape[0], kv_c.shape[1], k_pe.shape[1]
    check_slots(slot_mapping, tokens)
    check_device(kv_cache)
    strides = {kv_c.stride(1), k_pe.stride(1), kv_cache.stride(2)}
    if k_pe.shape[0] != tokens or kv_cache.ndim != 3 or kv_cache.shape[2] != rank + rotary or strides != {1}:
        raise AttentionInputError(
            f"latents of shape {tuple(kv_c.shape)} and rotary keys of {tuple(k_pe.shape)} for a cache of "
            f"{tuple(kv_cache.shape)}: needs (blocks, block size, {rank + rotary}), rows contiguous"
        )
    if kv_cache.dtype != torch.float8_e4m3fn and not kv_c.dtype == k_pe.dtype == kv_cache.dtype:
        raise AttentionInputError(f"latents of {kv_c.dtype} and {k_pe.dtype} for a cache of {kv_cache.dtype}")
    check_span("a block of the cache", kv_cache, 2)
    if tokens == 0:
        return
    rank_padded = triton.next_power_of_2(rank)
    with on_device(kv_cache):
        _concat_and_cache_kernel[(tokens,)](
            kv_c, k_pe, kv_cache, slot_mapping, scale, kv_c.stride(0), k_pe.stride(0), *kv_cache.stride()[:2],
            R=rank, R_PAD=rank_padded, P=rotary, P_PAD=triton.next_power_of_2(rotary), BLOCK_SIZE=kv_cache.shape[1],
            num_warps=min(4, max(1, rank_padded // 256)),
        )  # fmt: skip
