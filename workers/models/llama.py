"""One layer of the decoder: attention and MLP around a residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attention.layers.attention import Attention
from workers.layers.linear import GatedMLP, Linear, RMSNorm, RowParallelLinear
from workers.models.config.model_config import ModelConfig
from workers.models.rotary import Rotation
from workers.ops.cache_write import CacheWrite
from workers.parallel.group import TensorParallelGroup


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    Args:
        config: what this rank computes, see `ModelConfig.sharded`.
        attention: its heads'.
        rotation: what all layers share.
        dtype: of the weights.
        device: where they are.
        group: the ranks that share the layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Attention,
        rotation: Rotation,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        super().__init__()
        self.attention = attention
        self._rotation = rotation
        self._head_size = config.head_size
        rotated = config.num_heads + config.num_kv_heads
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype, device=device)
        qkv_size = (rotated + config.num_kv_heads) * config.head_size
        self.qkv_proj = Linear(config.hidden_size, qkv_size, config.qkv_bias, dtype, device)
        self.qk_norm = (
            RMSNorm(rotated, config.head_size, eps=eps, dtype=dtype, device=device) if config.qk_norm else None
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_size, config.hidden_size, config.o_bias, dtype, device, group
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, device, group)

    def forward(
        self, hidden: torch.Tensor, normed: torch.Tensor, prepared: Any, cache: CacheWrite | None, next_norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's step of the residual stream; inside a `forward_context`.

        Args:
            hidden: (T, hidden_size), the residual stream; may be overwritten.
            normed: the same behind `input_norm`.
            prepared: what the rotation made of the batch's positions.
            cache: where the rotation stores keys and values; None where attention does.
            next_norm: the norm behind this layer, which is taken along with the addition before it.

        Returns:
            The residual stream, and the same behind `next_norm`.
        """
        attended = self._attend(normed, prepared, cache)
        hidden, normed = self.o_proj.add_and_norm(hidden, attended, self.post_attention_norm)
        return self.mlp.add_and_norm(hidden, normed, next_norm)

    def _attend(self, normed: torch.Tensor, prepared: Any, cache: CacheWrite | None) -> torch.Tensor:
        qkv = self.qkv_proj(normed).view(normed.shape[0], -1, self._head_size)
        attended: torch.Tensor = self.attention(*self._rotation.apply(qkv, prepared, self.qk_norm, cache))
        return attended.flatten(1)
