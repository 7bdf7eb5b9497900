"""Phi-3, Phi-4 and Phi-4-mini (arXiv:2404.14219, arXiv:2412.08905, arXiv:2503.01743): Llama's layers, stored fused.

Their contexts are extended by LongRoPE, which the first checkpoints call "su" or "yarn".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.config.rope import RopeFamily
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM

_ROPE = RopeFamily(
    partial_rotary_factor=1.0,
    original_max_position_embeddings=4096,
    renamed={"su": "longrope", "yarn": "longrope"},
)


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """Phi-3."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        num_layers, num_heads = read.positive_int("num_hidden_layers"), read.positive_int("num_attention_heads")
        window = read.optional_positive_int("sliding_window")
        if window is not None and window >= read.positive_int("max_position_embeddings"):
            window = None  # as most of them state it: no query has so many tokens before it
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, (window,) * num_layers, num_kv_heads=num_heads, rope=_ROPE),
            fused_qkv=True,
            fused_gate_up=True,
        )


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi-3."""

    config_class = Phi3Config
