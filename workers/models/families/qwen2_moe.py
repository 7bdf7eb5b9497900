"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2's layers with experts, one of them for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from workers.layers.moe.mlp import MoEConfig
from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.config.model_config import ModelConfig
from workers.models.families.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    map_expert_matrices,
    map_router,
    map_shared_experts,
    read_num_experts,
    read_top_k,
)
from workers.models.weight_map import WeightMap
from workers.ops.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(LlamaMoEConfig):
    """Qwen2-MoE."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        moe = replace(
            read_experts(read),
            shared_intermediate_size=read.positive_int("shared_expert_intermediate_size"),
            shared_gate=True,
        )
        return cls(
            **cls.read_common(read, generation_config) | {"intermediate_size": moe.features},
            attention=read_attention(read, _read_windows(read)),
            qkv_bias=read.flag("qkv_bias"),
            moe=moe,
            is_sparse=read_sparse_layers(read),
            dense_intermediate_size=read.positive_int("intermediate_size"),
        )


def read_experts(read: ConfigReader) -> MoEConfig:
    """Experts by softmax, in Qwen's spelling.

    Raises:
        CheckpointError: a value is missing or wrong; names file and key.
    """
    num_experts = read_num_experts(read)
    router = RouterConfig(num_experts, read_top_k(read, num_experts), renormalize=read.flag("norm_topk_prob"))
    return MoEConfig(router=router, intermediate_size=read.positive_int("moe_intermediate_size"))


def read_sparse_layers(read: ConfigReader) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`th, but for `mlp_only_layers`.

    Raises:
        CheckpointError: a value is wrong; names file and key.
    """
    step, dense = read.positive_int("decoder_sparse_step"), read.int_list("mlp_only_layers")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(read.positive_int("num_hidden_layers")))


def _read_windows(read: ConfigReader) -> tuple[int | None, ...]:
    """Every other of the first `max_window_layers` layers has a window, where `use_sliding_window` says so."""
    num_layers = read.positive_int("num_hidden_layers")
    if not read.flag("use_sliding_window"):
        return (None,) * num_layers
    limit = read.non_negative_int("max_window_layers")
    default = [SLIDING if i % 2 == 0 and i < limit else FULL for i in range(num_layers)]
    return windows_of(read_layer_types(read, (FULL, SLIDING), default), read.positive_int("sliding_window"))


class Qwen2MoeForCausalLM(LlamaMoEForCausalLM):
    """Qwen2-MoE, and Qwen3-MoE as to its experts."""

    config_class: ClassVar[type[ModelConfig]] = Qwen2MoeConfig

    @classmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """See `LlamaMoEForCausalLM.map_experts`."""
        map_router(config, weights, f"{theirs}.mlp.gate", ours)
        map_expert_matrices(config, weights, theirs, ours)
        if config.moe.shared_intermediate_size:
            map_shared_experts(config, weights, theirs, ours, "mlp.shared_expert", gate="mlp.shared_expert_gate")
