"""Granite 3 (IBM, 2024): Llama's layers, with stated factors for embeddings, scores, summands and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """Granite."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        biased = read.flag("attention_bias")
        num_heads, scale = read.positive_int("num_attention_heads"), read.positive_float("attention_multiplier")
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, num_kv_heads=num_heads, scale=scale),
            qkv_bias=biased,
            o_bias=biased,
            mlp_bias=read.flag("mlp_bias"),
            embedding_scale=read.positive_float("embedding_multiplier"),
            residual_scale=read.positive_float("residual_multiplier"),
            logits_scale=1.0 / read.positive_float("logits_scaling"),
        )


class GraniteForCausalLM(LlamaForCausalLM):
    """Granite."""

    config_class = GraniteConfig
