"""How a decoder layer's heads are normalised and rotated: in plain torch, or in one kernel on a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from workers.layers.linear import RMSNorm
from workers.models.config.model_config import ModelConfig
from workers.ops.cache_write import CacheWrite
from workers.ops.qk_norm_rope import cos_sin_table, qk_norm_rope_
from workers.ops.rotary_frequencies import Rotary

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Rotation(Protocol):
    """Turns the fused projection of a layer into queries, keys and values."""

    can_store: bool
    """Whether `apply` can put keys and values in the cache itself."""

    def prepare(self, positions: torch.Tensor) -> Any:
        """What all layers share for a batch at (T,) int64 `positions`."""
        ...

    def apply(self, qkv: torch.Tensor, prepared: Any, qk_norm: RMSNorm | None, cache: CacheWrite | None) -> Heads:
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


def make_rotation(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Rotation:
    """The one for this device."""
    return (FusedRotation if device.type == "cuda" else PlainRotation)(config, dtype, device)


class PlainRotation:
    """In plain torch, with the angles of a batch computed once."""

    can_store = False

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._rotary = Rotary(config.rope, config.head_size, dtype, device)
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads

    def prepare(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines."""
        return self._rotary.angles(positions)

    def apply(
        self,
        qkv: torch.Tensor,
        prepared: tuple[torch.Tensor, torch.Tensor],
        qk_norm: RMSNorm | None,
        cache: CacheWrite | None,
    ) -> Heads:
        """See `Rotation`."""
        rotated = self._num_heads + self._num_kv_heads
        query_key = qkv[:, :rotated]
        if qk_norm is not None:
            query_key = qk_norm(query_key)
        query_key = self._rotary.rotate(query_key, prepared)
        return query_key[:, : self._num_heads], query_key[:, self._num_heads :], qkv[:, rotated:]


class FusedRotation:
    """In place, in one kernel, with the angles of all positions computed when the model is made."""

    can_store = True

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._table = cos_sin_table(config.rope, config.head_size, config.max_position_embeddings, device)
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads

    def prepare(self, positions: torch.Tensor) -> torch.Tensor:
        """The positions themselves."""
        return positions

    def apply(
        self, qkv: torch.Tensor, prepared: torch.Tensor, qk_norm: RMSNorm | None, cache: CacheWrite | None
    ) -> Heads:
        """See `Rotation`."""
        weight, eps = (None, 0.0) if qk_norm is None else (qk_norm.weight, qk_norm.eps)
        qk_norm_rope_(qkv, self._num_heads, self._num_kv_heads, prepared, self._table, weight, eps, cache)
        if cache is not None:
            return qkv[:, : self._num_heads], None, None
        query, key, value = qkv.split((self._num_heads, self._num_kv_heads, self._num_kv_heads), dim=1)
        return query, key, value
