"""What backends of latent attention have in common: storing latents, reading them, and the two changes of space."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from attention.fp8 import dequantize
from attention.kv_cache import concat_and_cache_mla, take_rows
from attention.ops.dispatch import uses_triton
from attention.spec import FP8

HALF_BYTES = 2
"""Of an element of the dtypes that matrix units multiply."""


def write_latents(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, scale: float = 1.0
) -> None:
    """`concat_and_cache_mla`, with the Triton kernel where Triton runs and the device converts to FP8 itself."""
    if uses_triton(kv_cache) and (kv_cache.dtype != FP8 or _converts(kv_cache)):
        from attention.ops.triton.latent.cache_write import concat_and_cache_mla as kernel

        kernel(kv_c, k_pe, kv_cache, slot_mapping, scale)
    else:
        concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, scale)


def read_latents(kv_cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Latents and rotary keys of these slots, copied out of a layer's cache: (S, latent size).

    Args:
        kv_cache: (num_blocks, block_size, latent size).
        slots: (S,) int64; a negative one, which belongs to no token, gives some row.
        dtype: of the result.
        scale: of an FP8 cache.
    """
    rows = take_rows(kv_cache.view(-1, kv_cache.shape[-1]), slots.clamp(min=0))
    return dequantize(rows, scale).to(dtype) if rows.dtype == FP8 else rows


def expand(
    kv_c: torch.Tensor, kv_b_proj: torch.Tensor, num_heads: int, nope_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys without their rotary part, and values, of every head: two views of one product.

    Args:
        kv_c: (S, R) normalised latents.
        kv_b_proj: (Hq * (D + V), R), in each head the keys' part first.
        num_heads: Hq.
        nope_size: D.

    Returns:
        (S, Hq, D) and (S, Hq, V).
    """
    heads = F.linear(kv_c, kv_b_proj).view(kv_c.shape[0], num_heads, -1)
    return heads[..., :nope_size], heads[..., nope_size:]


def expand_joined(
    kv_c: torch.Tensor, rotary_key: torch.Tensor, w_uk: torch.Tensor, w_uv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole keys, the rotary part behind the other, and values of every head: the products are written where they go.

    Args:
        kv_c: (S, R) normalised latents.
        rotary_key: (S, P), of all heads.
        w_uk: (Hq, D, R).
        w_uv: (Hq, V, R).

    Returns:
        (S, Hq, D + P) and (S, Hq, V).
    """
    tokens, heads, size = kv_c.shape[0], w_uk.shape[0], w_uk.shape[1]
    key = kv_c.new_empty(tokens, heads, size + rotary_key.shape[1])
    value = kv_c.new_empty(tokens, heads, w_uv.shape[1])
    latents = kv_c.unsqueeze(0).expand(heads, -1, -1)
    torch.bmm(latents, w_uk.transpose(1, 2), out=key[..., :size].transpose(0, 1))
    torch.bmm(latents, w_uv.transpose(1, 2), out=value.transpose(0, 1))
    key[..., size:] = rotary_key.unsqueeze(1)
    return key, value


def absorb(query: torch.Tensor, w_uk: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
    """Take queries into the latents' space: `W_UKᵀ q` of every head.

    Args:
        query: (B, Hq, D); may be a view of wider heads.
        w_uk: (Hq, D, R).
        output: (B, Hq, R), written and returned when given; may be a view of wider heads.

    Returns:
        (B, Hq, R).
    """
    if output is None:
        output = query.new_empty(query.shape[0], query.shape[1], w_uk.shape[2])
    _head_product(query, w_uk, output)
    return output


def unabsorb(attended: torch.Tensor, w_uv: torch.Tensor, output: torch.Tensor) -> None:
    """Take sums of latents to values: `W_UV o` of every head.

    Args:
        attended: (B, Hq, R).
        w_uv: (Hq, V, R).
        output: (B, Hq, V), written.
    """
    _head_product(attended, w_uv.transpose(1, 2), output)


def _head_product(x: torch.Tensor, matrices: torch.Tensor, output: torch.Tensor) -> None:
    """`output[b, h] = x[b, h] @ matrices[h]`: of a few rows in a kernel of our own."""
    if uses_triton(x) and x.element_size() == HALF_BYTES:
        from attention.ops.triton.latent.head_products import MAX_ROWS, head_product

        if x.shape[0] <= MAX_ROWS:
            head_product(x, matrices, output)
            return
    torch.bmm(x.transpose(0, 1), matrices, out=output.transpose(0, 1))


def _converts(tensor: torch.Tensor) -> bool:
    from attention.ops.triton.launch import device_traits

    return device_traits(tensor.device).converts_e4m3
