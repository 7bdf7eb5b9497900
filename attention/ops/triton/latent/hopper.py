"""Decode of latent attention on Hopper GPUs by a kernel of its own, where the model has many heads."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attention.ops.triton.launch import MAX_OFFSET, DeviceTraits, compiles_gluon
from attention.ops.triton.tuning import Tile

TILE = Tile(rows=64, keys=64, num_warps=4, num_stages=2)
"""The kernel's: heads of a program, of which it serves multiples, and latents of a step."""
_RANK, _ROTARY = 512, 64
_ALIGNMENT = 16
"""Bytes that the Tensor Memory Accelerator's addresses and strides are multiples of."""


def serves(query: torch.Tensor, rotary_query: torch.Tensor, cache: torch.Tensor, traits: DeviceTraits) -> bool:
    """Whether the kernel computes this: 16-bit latents of 512 + 64 in blocks of multiples of 64, 64 heads or more.

    Args:
        query: (B, Hq, R).
        rotary_query: (B, Hq, P).
        cache: (num_blocks, block_size, R + P).
        traits: the device.
    """
    num_blocks, block_size, _ = cache.shape
    return (
        compiles_gluon(traits)
        and query.dtype in (torch.bfloat16, torch.float16)
        and cache.dtype == query.dtype
        and (query.shape[2], rotary_query.shape[2]) == (_RANK, _ROTARY)
        and query.shape[1] % TILE.rows == 0
        and block_size % TILE.keys == 0
        and _is_matrix(cache)
        and 0 < num_blocks * block_size <= MAX_OFFSET
    )


def _is_matrix(cache: torch.Tensor) -> bool:
    """Whether blocks follow each other as rows of one matrix that the Tensor Memory Accelerator reads."""
    aligned = cache.data_ptr() % _ALIGNMENT == 0 and cache.stride(1) * cache.element_size() % _ALIGNMENT == 0
    return aligned and cache.stride(0) == cache.shape[1] * cache.stride(1)


def cache_tiles(cache: torch.Tensor) -> tuple[Any, Any]:
    """Descriptors of the cache's tiles, as the kernel takes them: of half of the latent, and of the rotary key."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    rows = cache.view(-1, cache.shape[2])
    half, rotary = (
        TensorDescriptor.from_tensor(rows, [TILE.keys, width], _layout(width, cache.dtype))
        for width in (_RANK // 2, _ROTARY)
    )
    return half, rotary


@functools.cache
def _layout(width: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([TILE.keys, width], getattr(gl, str(dtype).removeprefix("torch.")))
