"""Gemma 2 (arXiv:2408.00118): norms before and behind each block, capped logits, windows in every other layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.norm import RMSNorm
from workers.layers.residual import Norm, ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch
from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM, make_head_norm, make_mlp, make_self_attention


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """Gemma 2, and what differs from it by the fields of `LlamaConfig`."""

    @classmethod
    def read_gemma(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """What Gemma 2 and 3 have in common, but for `attention`, as keyword arguments.

        Raises:
            CheckpointError: a value is missing, wrong or not supported; names file and key.
        """
        read.refuse_others({"use_bidirectional_attention": False})
        common = cls.read_common(read, generation_config, activation_key="hidden_activation")
        biased = read.flag("attention_bias", False)
        return {
            **common,
            "tie_word_embeddings": read.flag("tie_word_embeddings", True),
            "embedding_scale": math.sqrt(common["hidden_size"]),
            "rounds_embedding_scale": True,
            "logits_soft_cap": read.optional_positive_float("final_logit_softcapping"),
            "qkv_bias": biased,
            "o_bias": biased,
        }

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        num_layers = read.positive_int("num_hidden_layers")
        types = read_layer_types(read, (FULL, SLIDING), [FULL if i % 2 else SLIDING for i in range(num_layers)])
        scale = read_query_scale(read)
        soft_cap = read.optional_positive_float("attn_logit_softcapping")
        layers = read_attention(read, windows_of(types, read.positive_int("sliding_window")), head_size=256)
        return cls(
            **cls.read_gemma(read, generation_config),
            attention=tuple(replace(layer, scale=scale, soft_cap=soft_cap) for layer in layers),
        )


def read_query_scale(read: ConfigReader) -> float:
    """What multiplies q·k: `query_pre_attn_scalar`^-1/2, which is not always that of the head size.

    Raises:
        CheckpointError: not a number above 0; names file and key.
    """
    return float(read.positive_float("query_pre_attn_scalar") ** -0.5)


class Gemma2Layer(nn.Module):
    """Attention and MLP, each between two norms, of which the second comes before the sum with the stream."""

    def __init__(self, config: Gemma2Config, attention: Attention, rotation: Rotation, context: LayerContext) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        norm = make_head_norm(config, attention, context, plus_one=True) if config.qk_norm else None
        self.input_norm = RMSNorm(hidden, eps, context, plus_one=True)
        self.self_attention = make_self_attention(config, attention, rotation, context, head_norm=norm)
        self.post_attention_norm = RMSNorm(hidden, eps, context, plus_one=True)
        self.pre_mlp_norm = RMSNorm(hidden, eps, context, plus_one=True)
        self.mlp = make_mlp(config, context)
        self.post_mlp_norm = RMSNorm(hidden, eps, context, plus_one=True)

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        attended = self.self_attention(stream.normalized(self.input_norm), batch)
        stream.add(self.post_attention_norm(self.self_attention.o_proj(attended)))
        stream.add(self.post_mlp_norm(self.mlp(stream.normalized(self.pre_mlp_norm))))


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2, and what differs from it by the fields of `Gemma2Config`."""

    config_class = Gemma2Config
    config: Gemma2Config
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    }

    def make_layer(self, index: int, attention: Attention, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        return Gemma2Layer(self.config, attention, rotation, self.context)

    def make_norm(self) -> Norm:
        """See `CausalLM.make_norm`."""
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.context, plus_one=True)
