"""GLM-4-0414 (Zhipu, 2025): GLM with a norm behind attention and MLP, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.norm import RMSNorm
from workers.layers.residual import ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch
from workers.models.families.glm import GlmConfig
from workers.models.families.llama import LlamaForCausalLM, make_mlp, make_self_attention


class Glm4Layer(nn.Module):
    """Attention and MLP, each between two norms, added to the residual stream."""

    def __init__(self, config: GlmConfig, attention: Attention, rotation: Rotation, context: LayerContext) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.input_norm = RMSNorm(hidden, eps, context)
        self.self_attention = make_self_attention(config, attention, rotation, context)
        self.post_attention_norm = RMSNorm(hidden, eps, context)
        self.pre_mlp_norm = RMSNorm(hidden, eps, context)
        self.mlp = make_mlp(config, context)
        self.post_mlp_norm = RMSNorm(hidden, eps, context)

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        attended = self.self_attention(stream.normalized(self.input_norm), batch)
        stream.add(self.post_attention_norm(self.self_attention.o_proj(attended)))
        stream.add(self.post_mlp_norm(self.mlp(stream.normalized(self.pre_mlp_norm))))


class Glm4ForCausalLM(LlamaForCausalLM):
    """GLM-4-0414."""

    config_class = GlmConfig
    config: GlmConfig
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "input_norm",
        "post_self_attn_layernorm": "post_attention_norm",
        "post_attention_layernorm": "pre_mlp_norm",
        "post_mlp_layernorm": "post_mlp_norm",
    }

    def make_layer(self, index: int, attention: Attention, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        return Glm4Layer(self.config, attention, rotation, self.context)
