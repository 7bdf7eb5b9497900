"""How a decoder layer's heads are normalised and rotated: in plain torch, or in one kernel on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.layers.norm import HeadNorm, RMSNorm
from workers.ops.cache_write import CacheWrite
from workers.ops.latent_norm_rope import latent_norm_rope_
from workers.ops.qk_norm_rope import cos_sin_table, qk_norm_rope_
from workers.ops.rope_config import RopeConfig
from workers.ops.rotary_frequencies import Rotary

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Latents = tuple[torch.Tensor | None, torch.Tensor | None]


class Rotation(Protocol):
    """Turns the fused projection of a layer into queries, keys and values."""

    can_store: bool
    """Whether `apply` can put keys and values in the cache itself."""

    def prepare(self, positions: torch.Tensor) -> Any:
        """What all layers share for a batch at (T,) int64 `positions`."""
        ...

    def apply(self, qkv: torch.Tensor, prepared: Any, qk_norm: HeadNorm | None, cache: CacheWrite | None) -> Heads:
        """Normalise, where the model does, and rotate.

        Args:
            qkv: (T, Hq + 2 * Hkv, D); may be overwritten.
            prepared: from `prepare`.
            qk_norm: of query and key heads, weight (Hq + Hkv, D).
            cache: also store keys and values there; only with `can_store`.

        Returns:
            Queries (T, Hq, D), keys (T, Hkv, D), values (T, Hkv, D); no keys and values where they are stored.
        """
        ...

    def apply_latent(
        self, query: torch.Tensor, latent: torch.Tensor, prepared: Any, norm: RMSNorm, cache: CacheWrite | None
    ) -> Latents:
        """Normalise latents, and rotate the rotary parts of queries and keys, in place.

        Args:
            query: (T, Hq, D + P), of which the last P numbers of a head turn.
            latent: (T, R + P), the latent and behind it the rotary key.
            prepared: from `prepare`.
            norm: of latents.
            cache: also store both there; only with `can_store`.

        Returns:
            Latents (T, R) and rotary keys (T, P); neither where they are stored.
        """
        ...


@dataclass(frozen=True)
class HeadShape:
    """Which heads a rank's layer has: Hq of queries and Hkv of keys and of values, each of D numbers."""

    num_heads: int
    num_kv_heads: int
    head_size: int


def make_rotation(
    rope: RopeConfig | None, heads: HeadShape, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """The one for this device.

    Args:
        rope: what is rotated, and how; None: nothing (a layer without positions), heads are normalised at most.
        heads: of a layer.
        max_model_len: tokens of the longest sequence that is served.
        dtype: of the heads.
        device: where they are.
    """
    return (FusedRotation if device.type == "cuda" else PlainRotation)(rope, heads, max_model_len, dtype, device)


def make_rotations(
    kinds: Iterable[tuple[RopeConfig | None, HeadShape]], max_model_len: int, dtype: torch.dtype, device: torch.device
) -> Mapping[tuple[RopeConfig | None, HeadShape], Rotation]:
    """One rotation for each different kind, of which a layer has one; what it prepares serves all its layers."""
    return {kind: make_rotation(*kind, max_model_len, dtype, device) for kind in dict.fromkeys(kinds)}


class PlainRotation:
    """In plain torch, with the angles of a batch computed once. Arguments as of `make_rotation`."""

    can_store = False

    def __init__(
        self, rope: RopeConfig | None, heads: HeadShape, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rotary = None if rope is None else Rotary(rope, heads.head_size, dtype, device, max_model_len)
        self._num_heads, self._num_kv_heads = heads.num_heads, heads.num_kv_heads

    def prepare(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines, where anything is rotated."""
        return None if self._rotary is None else self._rotary.angles(positions)

    def apply(
        self,
        qkv: torch.Tensor,
        prepared: tuple[torch.Tensor, torch.Tensor] | None,
        qk_norm: HeadNorm | None,
        cache: CacheWrite | None,
    ) -> Heads:
        """See `Rotation`."""
        rotated = self._num_heads + self._num_kv_heads
        query_key = qkv[:, :rotated]
        if qk_norm is not None:
            query_key = qk_norm(query_key)
        if self._rotary is not None and prepared is not None:
            query_key = self._rotary.rotate(query_key, prepared)
        return query_key[:, : self._num_heads], query_key[:, self._num_heads :], qkv[:, rotated:]

    def apply_latent(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        prepared: tuple[torch.Tensor, torch.Tensor] | None,
        norm: RMSNorm,
        cache: CacheWrite | None,
    ) -> Latents:
        """See `Rotation`."""
        rank = norm.weight.shape[0]
        kv_c, k_pe = latent[:, :rank], latent[:, rank:]
        if self._rotary is not None and prepared is not None:
            for heads in (query[..., query.shape[2] - k_pe.shape[1] :], k_pe.unsqueeze(1)):
                heads.copy_(self._rotary.rotate(heads, prepared))
        return norm(kv_c), k_pe


class FusedRotation:
    """In place, in one kernel, with the angles of all positions computed when the model is made.

    Arguments as of `make_rotation`. The table of angles takes `4 * max_model_len` bytes for each rotated dimension.
    """

    can_store = True

    def __init__(
        self, rope: RopeConfig | None, heads: HeadShape, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._table = None if rope is None else cos_sin_table(rope, heads.head_size, max_model_len, device)
        self._interleaved = rope is not None and rope.interleaved
        self._num_heads, self._num_kv_heads = heads.num_heads, heads.num_kv_heads

    def prepare(self, positions: torch.Tensor) -> torch.Tensor:
        """The positions themselves."""
        return positions

    def apply(
        self, qkv: torch.Tensor, prepared: torch.Tensor, qk_norm: HeadNorm | None, cache: CacheWrite | None
    ) -> Heads:
        """See `Rotation`."""
        weight, eps = (None, 0.0) if qk_norm is None else (qk_norm.weight, qk_norm.eps)
        qk_norm_rope_(
            qkv,
            self._num_heads,
            self._num_kv_heads,
            prepared,
            self._table,
            weight,
            eps,
            cache,
            self._interleaved,
        )
        if cache is not None:
            return qkv[:, : self._num_heads], None, None
        query, key, value = qkv.split((self._num_heads, self._num_kv_heads, self._num_kv_heads), dim=1)
        return query, key, value

    def apply_latent(
        self, query: torch.Tensor, latent: torch.Tensor, prepared: torch.Tensor, norm: RMSNorm, cache: CacheWrite | None
    ) -> Latents:
        """See `Rotation`."""
        latent_norm_rope_(query, latent, prepared, self._table, norm.weight, norm.eps, cache, self._interleaved)
        if cache is not None:
            return None, None
        rank = norm.weight.shape[0]
        return latent[:, :rank], latent[:, rank:]
