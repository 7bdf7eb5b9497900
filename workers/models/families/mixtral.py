"""Mixtral (arXiv:2401.04088): Mistral's layers with experts in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.layers.moe.mlp import MoEConfig
from workers.loading.config_reader import ConfigReader
from workers.loading.expert_weights import expert_by_expert, fused
from workers.models.config.heads import read_attention
from workers.models.config.rope import RopeFamily
from workers.models.families.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    map_router,
    read_num_experts,
    read_top_k,
)
from workers.models.weight_map import WeightMap
from workers.ops.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(LlamaMoEConfig):
    """Mixtral."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        num_experts, num_layers = read_num_experts(read), read.positive_int("num_hidden_layers")
        router = RouterConfig(num_experts, read_top_k(read, num_experts), renormalize=True)
        moe = MoEConfig(router=router, intermediate_size=read.positive_int("intermediate_size"))
        windows = (read.optional_positive_int("sliding_window"),) * num_layers
        return cls(
            **cls.read_common(read, generation_config) | {"intermediate_size": moe.features},
            attention=read_attention(read, windows, rope=RopeFamily(theta=1000000.0)),
            moe=moe,
            is_sparse=(True,) * num_layers,
        )


class MixtralForCausalLM(LlamaMoEForCausalLM):
    """Mixtral."""

    config_class = MixtralConfig

    @classmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """See `LlamaMoEForCausalLM.map_experts`."""
        sizes, published, renamed = config.expert_sizes(weights), weights.like(), weights.like()
        map_router(config, published, f"{theirs}.block_sparse_moe.gate", ours)
        experts = expert_by_expert(sizes, "block_sparse_moe.experts", ("w1", "w3", "w2"))
        published.extend(experts, theirs, ours)
        map_router(config, renamed, f"{theirs}.mlp.gate", ours)
        renamed.extend(fused(sizes), theirs, ours)
        weights.one_of(published, renamed)
