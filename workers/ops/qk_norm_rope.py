"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) in place, with what surrounds it in a decoder layer.

Halves or interleaved pairs are rotated, of whole heads or their first part, as `workers.ops.rotary_frequencies` does.
Normalisation of every query and key head (Qwen3) may come before, and storing keys and values in the paged KV cache
after, both in the same kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from attention.kv_cache import reshape_and_cache
from workers.ops.cache_write import CacheWrite
from workers.ops.rope_config import RopeConfig
from workers.ops.rope_frequencies import attention_factor, inverse_frequencies


def cos_sin_table(
    rope: RopeConfig, head_size: int, max_position: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(max_position, R): of each position the R / 2 cosines, then the R / 2 sines, times the kind's attention factor.

    R is `rope.rotary_dim(head_size)`. Angles are float32, as in `rotary_frequencies.Rotary`, and those of a model that
    serves sequences of `max_position` tokens; in float32 the table takes `4 * R` bytes a position.
    """
    positions = torch.arange(max_position, dtype=torch.float32, device=device)
    angles = positions[:, None] * inverse_frequencies(rope, head_size, max_position).to(device)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    factor = attention_factor(rope)
    return (table if factor == 1.0 else table.mul_(factor)).to(dtype)


def qk_norm_rope_(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    cache: CacheWrite | None = None,
    interleaved: bool = False,
) -> None:
    """Rotate the query and key heads in place; before that normalise them, after it store keys and values, if asked.

    Args:
        qkv: (T, Hq + 2 * Hkv, D), query heads, then key heads, then value heads, the elements of a head contiguous;
            may be a view of a wider tensor. Value heads are left as they are.
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        positions: (T,) int64, each less than the table's length, which nothing checks on a GPU.
        cos_sin: from `cos_sin_table`, (positions, R) of any floating dtype; the first R dimensions of a head are
            rotated. None: none are, in layers without positions.
        norm_weight: (Hq + Hkv, D), contiguous, of any floating dtype: each head is normalised, as by `rms_norm`,
            before it is rotated.
        eps: added to the mean square.
        cache: also store the rotated keys and the values, as `attention.kv_cache.reshape_and_cache` does.
        interleaved: dimensions (2i, 2i + 1) turn together, and not (i, i + R / 2).

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(qkv, num_q_heads, num_kv_heads, positions, cos_sin, norm_weight)
    if cache is not None:
        _check_cache(qkv, num_kv_heads, cache)
    if not qkv.is_cuda:
        qk_norm_rope_torch_(qkv, num_q_heads, num_kv_heads, positions, cos_sin, norm_weight, eps, cache, interleaved)
        return
    from workers.ops.triton.qk_norm_rope import launch_qk_norm_rope

    launch_qk_norm_rope(qkv, num_q_heads, num_kv_heads, positions, cos_sin, norm_weight, eps, cache, interleaved)


def qk_norm_rope_torch_(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    cache: CacheWrite | None = None,
    interleaved: bool = False,
) -> None:
    """`qk_norm_rope_` in plain torch."""
    query_key = qkv[:, : num_q_heads + num_kv_heads]
    heads = query_key.to(torch.float32, copy=True)
    if norm_weight is not None:
        heads = F.rms_norm(heads, heads.shape[-1:], None, eps) * norm_weight.float()
    if cos_sin is not None:
        _rotate_(heads, cos_sin[positions].float().unsqueeze(1), interleaved)
    if cos_sin is not None or norm_weight is not None:
        query_key.copy_(heads)
    if cache is not None:
        key, value = qkv[:, num_q_heads:].split(num_kv_heads, dim=1)
        reshape_and_cache(key, value, cache.kv_cache, cache.slot_mapping, cache.scales)


def _rotate_(heads: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> None:
    """Rotate (T, H, D) float32 heads in place, by (T, 1, R)."""
    cosines, sines = cos_sin.chunk(2, dim=-1)
    rotated = heads[..., : cos_sin.shape[-1]]
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    turned = first * cosines - second * sines, second * cosines + first * sines
    first.copy_(turned[0])
    second.copy_(turned[1])


def _check(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
) -> None:
    if qkv.dim() != 3 or qkv.shape[1] != num_q_heads + 2 * num_kv_heads or qkv.stride(2) != 1 or qkv.shape[2] % 2:
        raise ValueError(
            f"qkv of shape {tuple(qkv.shape)} with strides {qkv.stride()}: needs "
            f"(tokens, {num_q_heads} + 2 * {num_kv_heads} heads, even head size) with contiguous heads"
        )
    if positions.shape != qkv.shape[:1] or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(f"positions of {positions.dtype} {tuple(positions.shape)}: needs int64 ({qkv.shape[0]},)")
    if cos_sin is not None and not _is_table(cos_sin, qkv.shape[2]):
        raise ValueError(
            f"a table of cosines and sines of shape {tuple(cos_sin.shape)} with strides {cos_sin.stride()}: needs "
            f"(positions, an even number of at most {qkv.shape[2]}, the head size) with contiguous rows"
        )
    weight_shape = (num_q_heads + num_kv_heads, qkv.shape[2])
    if norm_weight is not None and (norm_weight.shape != weight_shape or not norm_weight.is_contiguous()):
        raise ValueError(f"norm weight of shape {tuple(norm_weight.shape)}: needs contiguous {weight_shape}")


def _is_table(cos_sin: torch.Tensor, head_size: int) -> bool:
    if cos_sin.dim() != 2 or cos_sin.stride(1) != 1:
        return False
    return 2 <= cos_sin.shape[1] <= head_size and cos_sin.shape[1] % 2 == 0


def _check_cache(qkv: torch.Tensor, num_kv_heads: int, cache: CacheWrite) -> None:
    kv_cache, slots = cache.kv_cache, cache.slot_mapping
    layout = (2, num_kv_heads, qkv.shape[2])
    if kv_cache.dim() != 5 or (kv_cache.shape[1], *kv_cache.shape[3:]) != layout or kv_cache.stride(4) != 1:
        raise ValueError(
            f"KV cache of shape {tuple(kv_cache.shape)} with strides {kv_cache.stride()}: "
            f"needs (blocks, 2, block size, {num_kv_heads}, {qkv.shape[2]}) with contiguous heads"
        )
    if kv_cache.dtype not in (qkv.dtype, torch.float8_e4m3fn):
        raise ValueError(f"a KV cache of {kv_cache.dtype} for heads of {qkv.dtype}: needs that or float8_e4m3fn")
    if slots.shape != qkv.shape[:1] or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slot_mapping of {slots.dtype} {tuple(slots.shape)}: needs int64 ({qkv.shape[0]},)")
