"""Qwen3-MoE (arXiv:2505.09388): Qwen3's layers with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import read_attention
from workers.models.families.llama_moe import LlamaMoEConfig
from workers.models.families.qwen2_moe import Qwen2MoeForCausalLM, read_experts, read_sparse_layers


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(LlamaMoEConfig):
    """Qwen3-MoE."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        biased, moe = read.flag("attention_bias"), read_experts(read)
        window = read.positive_int("sliding_window") if read.flag("use_sliding_window") else None
        windows = (window,) * read.positive_int("num_hidden_layers")
        return cls(
            **cls.read_common(read, generation_config) | {"intermediate_size": moe.features},
            attention=read_attention(read, windows),
            qkv_bias=biased,
            o_bias=biased,
            qk_norm=True,
            moe=moe,
            is_sparse=read_sparse_layers(read),
            dense_intermediate_size=read.positive_int("intermediate_size"),
        )


class Qwen3MoeForCausalLM(Qwen2MoeForCausalLM):
    """Qwen3-MoE."""

    config_class = Qwen3MoeConfig
