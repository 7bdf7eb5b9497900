"""What stands between the projections of latent attention and attention, in place and in one kernel on a GPU.

The latent is normalised, the rotary parts of all query heads and the rotary key turn, and where a cache is given both
are stored in it.
"""

from __future__ import annotations

import torch

from attention.kv_cache import concat_and_cache_mla
from workers.ops.cache_write import CacheWrite
from workers.ops.qk_norm_rope import qk_norm_rope_torch_
from workers.ops.rms_norm import rms_norm_torch


def latent_norm_rope_(
    query: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    cache: CacheWrite | None = None,
    interleaved: bool = False,
) -> None:
    """Normalise latents, rotate queries and rotary keys, all in place, and store the latter two, if asked.

    Args:
        query: (T, Hq, D + P), the last P numbers of a head being turned; may be a view of a wider tensor.
        latent: (T, R + P), the latent and behind it the rotary key; may be a view of a wider tensor.
        positions: (T,) int64, each less than the table's length, which nothing checks on a GPU.
        cos_sin: of `workers.ops.qk_norm_rope.cos_sin_table` for heads of P, (positions, at most P); None: none turns.
        norm_weight: (R,), of any floating dtype.
        eps: added to the mean square.
        cache: a cache of (num_blocks, block_size, R + P), of the latent's dtype or float8_e4m3fn, and slots.
        interleaved: dimensions (2i, 2i + 1) turn together, and not (i, i + P / 2).

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(query, latent, positions, cos_sin, norm_weight, cache)
    if not query.is_cuda:
        latent_norm_rope_torch_(query, latent, positions, cos_sin, norm_weight, eps, cache, interleaved)
        return
    from workers.ops.triton.latent_norm_rope import launch_latent_norm_rope

    launch_latent_norm_rope(query, latent, positions, cos_sin, norm_weight, eps, cache, interleaved)


def latent_norm_rope_torch_(
    query: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    cache: CacheWrite | None = None,
    interleaved: bool = False,
) -> None:
    """`latent_norm_rope_` in plain torch."""
    rank = norm_weight.shape[0]
    kv_c, k_pe = latent[:, :rank], latent[:, rank:]
    rotary = k_pe.shape[1]
    kv_c.copy_(rms_norm_torch(kv_c, norm_weight, eps))
    for heads in (query[..., query.shape[2] - rotary :], k_pe.unsqueeze(1)):
        qk_norm_rope_torch_(heads, heads.shape[1], 0, positions, cos_sin, interleaved=interleaved)
    if cache is not None:
        concat_and_cache_mla(kv_c, k_pe, cache.kv_cache, cache.slot_mapping, cache.scales.k)


def _check(
    query: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    norm_weight: torch.Tensor,
    cache: CacheWrite | None,
) -> None:
    tokens, rank = query.shape[0], norm_weight.shape[0]
    rotary = latent.shape[-1] - rank
    fits = query.dim() == 3 and latent.dim() == 2 and latent.shape[0] == tokens and 0 < rotary <= query.shape[2]
    if not fits or query.dtype != latent.dtype or query.stride(2) != 1 or latent.stride(1) != 1:
        raise ValueError(
            f"queries of {query.dtype} {tuple(query.shape)} and latents of {latent.dtype} {tuple(latent.shape)} for a "
            f"norm of {rank}: needs (tokens, heads, head size) and (tokens, {rank} + rotary size), rows contiguous"
        )
    if positions.shape != (tokens,) or (cos_sin is not None and not 0 < cos_sin.shape[1] <= rotary):
        table = None if cos_sin is None else tuple(cos_sin.shape)
        raise ValueError(
            f"positions of {tuple(positions.shape)} and a table of {table} for {tokens} tokens of {rotary}"
        )
    if cache is not None and (cache.kv_cache.dim() != 3 or cache.kv_cache.shape[2] != latent.shape[1]):
        raise ValueError(f"a cache of {tuple(cache.kv_cache.shape)} for latents of {latent.shape[1]}")
