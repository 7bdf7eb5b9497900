"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with its projections."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from attention.layers.mla_attention import MLAAttention
from attention.spec import MLASpec
from workers.layers.context import LayerContext
from workers.layers.linear import Linear, RowParallelLinear
from workers.layers.norm import RMSNorm
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch


class LatentAttention(nn.Module):
    """From the normalised stream to what `o_proj` multiplies with.

    The latent and the rotary key are all ranks', and so is the compressed query; a rank has its share of the heads.

    Args:
        hidden_size: H.
        attention: of this rank's heads; the weight that expands latents, `kv_b_proj`, is its own.
        rotation: of heads of `qk_rope_head_dim`.
        context: of the model.
        q_lora_rank: size that queries are compressed to before they are expanded to heads; None: they are not.
        norm_eps: of the norms of latents and compressed queries.
        bias: whether the projections that compress have one, and the output projection.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: MLAAttention,
        rotation: Rotation,
        context: LayerContext,
        *,
        q_lora_rank: int | None,
        norm_eps: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_heads, mla = attention.spec.num_heads, cast(MLASpec, attention.spec.mla)
        self._head_size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        self.attention = attention
        self.rotation = rotation
        query_size = num_heads * self._head_size
        self._sizes = [query_size if q_lora_rank is None else q_lora_rank, mla.latent_size]
        self.qkv_a_proj = Linear(hidden_size, sum(self._sizes), bias, context)
        if self.qkv_a_proj.bias is not None:
            self.qkv_a_proj.bias.zero_()  # queries that are not compressed have none
        self.q_a_norm = None if q_lora_rank is None else RMSNorm(q_lora_rank, norm_eps, context)
        self.q_b_proj = None if q_lora_rank is None else Linear(q_lora_rank, query_size, False, context)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, norm_eps, context)
        self.o_proj = RowParallelLinear(num_heads * mla.v_head_dim, hidden_size, bias, context)

    def forward(self, x: torch.Tensor, batch: LayerBatch) -> torch.Tensor:
        """Attend; inside a `forward_context`.

        Args:
            x: (T, H), normalised.
            batch: of the forward pass.

        Returns:
            (T, Hq * v_head_dim), of this rank's heads.
        """
        query, latent = self.qkv_a_proj(x).split(self._sizes, dim=-1)
        if self.q_a_norm is not None and self.q_b_proj is not None:
            query = self.q_b_proj(self.q_a_norm(query))
        heads, prepared = query.unflatten(-1, (-1, self._head_size)), batch.rotations[self.rotation]
        cache_write = batch.cache_writes.get(self.attention.name)
        kv_c, k_pe = self.rotation.apply_latent(heads, latent, prepared, self.kv_a_norm, cache_write)
        attended: torch.Tensor = self.attention(heads, kv_c, k_pe)
        return attended.flatten(1)
