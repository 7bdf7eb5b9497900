"""Qwen3 (arXiv:2505.09388): Llama's layers with heads that are normalised before they are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM
from workers.models.families.qwen2 import read_windows


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """Qwen3."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        read.get("use_qk_norm"), read.get("qk_layernorm")  # the family has it, whatever is said
        biased = read.flag("attention_bias", False)
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, read_windows(read), head_size=128),
            qkv_bias=biased,
            o_bias=biased,
            qk_norm=True,
        )


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3."""

    config_class = Qwen3Config
