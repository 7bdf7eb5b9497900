"""Attention over keys and values of fewer heads than queries have (arXiv:2305.13245), with its projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.linear import Linear, RowParallelLinear
from workers.layers.norm import HeadNorm, WideNorm
from workers.layers.rotation import Rotation
from workers.layers.temperature import AttentionTemperature
from workers.ops.cache_write import CacheWrite


@dataclass(frozen=True)
class LayerBatch:
    """What the layers of one forward pass share.

    Attributes:
        positions: (T,) int64, of each token in its sequence.
        rotations: what each rotation made of the positions.
        cache_writes: where the rotation stores keys and values, by the layer's name; none where attention does.
    """

    positions: torch.Tensor
    rotations: Mapping[Rotation, Any]
    cache_writes: Mapping[str, CacheWrite]


class SelfAttention(nn.Module):
    """From the normalised stream to what `o_proj` multiplies with.

    Args:
        hidden_size: H.
        attention: of this rank's heads.
        rotation: of this rank's heads.
        context: of the model.
        qkv_bias: whether the query, key and value projections have a bias.
        o_bias: whether the output projection has one.
        qk_norm: of each head of queries and keys, before they are rotated.
        wide_norm: of all query heads together and all key heads together, before they are rotated.
        temperature: what queries are multiplied by, behind the rotation.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: Attention,
        rotation: Rotation,
        context: LayerContext,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: HeadNorm | None = None,
        wide_norm: WideNorm | None = None,
        temperature: AttentionTemperature | None = None,
    ) -> None:
        super().__init__()
        spec = attention.spec
        self.attention = attention
        self.rotation = rotation
        self.qk_norm, self.wide_norm = qk_norm, wide_norm
        self.temperature = temperature
        self._head_size = spec.head_size
        self._sizes = [heads * spec.head_size for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
        self.qkv_proj = Linear(hidden_size, sum(self._sizes), qkv_bias, context)
        self.o_proj = RowParallelLinear(self._sizes[0], hidden_size, o_bias, context)

    def forward(self, x: torch.Tensor, batch: LayerBatch) -> torch.Tensor:
        """Attend; inside a `forward_context`.

        Args:
            x: (T, H), normalised.
            batch: of the forward pass.

        Returns:
            (T, Hq * D), of this rank's heads.
        """
        qkv = self.qkv_proj(x)
        if self.wide_norm is not None:
            wide_q, wide_k, wide_v = qkv.split(self._sizes, dim=-1)
            qkv = torch.cat((*self.wide_norm(wide_q, wide_k), wide_v), dim=-1)
        heads = qkv.view(x.shape[0], -1, self._head_size)
        prepared, cache_write = batch.rotations[self.rotation], batch.cache_writes.get(self.attention.name)
        query, key, value = self.rotation.apply(heads, prepared, self.qk_norm, cache_write)
        if self.temperature is not None:
            query = self.temperature.scaled(query, batch.positions)
        attended: torch.Tensor = self.attention(query, key, value)
        return attended.flatten(1)
