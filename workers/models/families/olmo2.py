"""OLMo 2 (arXiv:2501.00656): norms behind attention and MLP in place of before them, and over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.norm import RMSNorm, WideNorm
from workers.layers.residual import ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch
from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.config.model_config import ModelConfig
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM, make_mlp, make_self_attention
from workers.models.weight_map import WeightMap


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(LlamaConfig):
    """OLMo 2."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        biased = read.flag("attention_bias")
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, num_kv_heads=read.positive_int("num_attention_heads")),
            qkv_bias=biased,
            o_bias=biased,
        )


class Olmo2Layer(nn.Module):
    """Attention and MLP on the stream as it is, each normalised before it is added."""

    def __init__(self, config: Olmo2Config, attention: Attention, rotation: Rotation, context: LayerContext) -> None:
        super().__init__()
        spec, eps = attention.spec, config.norm_eps
        query_size, key_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        wide_norm = WideNorm(query_size, key_size, eps, context)
        self.self_attention = make_self_attention(config, attention, rotation, context, wide_norm=wide_norm)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps, context)
        self.mlp = make_mlp(config, context)
        self.post_mlp_norm = RMSNorm(config.hidden_size, eps, context)

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        attended = self.self_attention(stream.value, batch)
        stream.add(self.post_attention_norm(self.self_attention.o_proj(attended)))
        stream.add(self.post_mlp_norm(self.mlp(stream.value)))


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2."""

    config_class = Olmo2Config
    config: Olmo2Config
    norms: ClassVar[Mapping[str, str]] = {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    }

    def make_layer(self, index: int, attention: Attention, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        return Olmo2Layer(self.config, attention, rotation, self.context)

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        super().map_weights(config, weights)
        for i, attention in enumerate(config.attention):
            weights.wide_norms(f"model.layers.{i}.self_attn", f"layers.{i}.self_attention", attention)
