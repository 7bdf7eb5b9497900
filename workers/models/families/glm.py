"""GLM-4 as it was published first (arXiv:2406.12793): Llama's layers with half of each head rotated, in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.config.rope import RopeFamily
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM

_ROPE = RopeFamily(partial_rotary_factor=0.5, interleaved=True)


@dataclass(frozen=True, kw_only=True)
class GlmConfig(LlamaConfig):
    """GLM."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, head_size=128, rope=_ROPE),
            qkv_bias=read.flag("attention_bias"),
            fused_gate_up=True,
        )


class GlmForCausalLM(LlamaForCausalLM):
    """GLM."""

    config_class = GlmConfig
