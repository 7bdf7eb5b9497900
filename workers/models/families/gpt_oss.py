"""gpt-oss (arXiv:2508.10925): windows in every other layer, sinks, experts with biases and a clamped SwiGLU.

Experts are stored in bfloat16 or, as published, in MXFP4, which is dequantised while it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from workers.layers.activation import GatedActivation
from workers.layers.moe.mlp import MoEConfig
from workers.loading.config_reader import ConfigReader
from workers.loading.expert_weights import interleaved, interleaved_mxfp4
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.config.model_config import ModelConfig
from workers.models.config.quantization import weight_format
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

_MXFP4 = "mxfp4"
_ROPE = RopeFamily(
    theta=150000.0,
    parameters={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(LlamaMoEConfig):
    """gpt-oss.

    Attributes:
        in_mxfp4: whether the experts are stored so.
    """

    in_mxfp4: bool = False

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        if read.get_or_default("hidden_act") != "silu":
            raise read.error("hidden_act", f"{read.get('hidden_act')!r} is not supported, only 'silu'")
        num_experts, num_layers = read_num_experts(read), read.positive_int("num_hidden_layers")
        moe = MoEConfig(
            router=RouterConfig(num_experts, read_top_k(read, num_experts), scores="softmax_of_chosen"),
            intermediate_size=read.positive_int("intermediate_size"),
            router_bias=True,
            expert_bias=True,
        )
        activation = GatedActivation(
            "clamped_swiglu", read.positive_float("swiglu_alpha", 1.702), read.positive_float("swiglu_limit", 7.0)
        )
        types = read_layer_types(read, (FULL, SLIDING), [FULL if i % 2 else SLIDING for i in range(num_layers)])
        layers = read_attention(read, windows_of(types, read.positive_int("sliding_window")), head_size=64, rope=_ROPE)
        biased = read.flag("attention_bias", True)
        return cls(
            **cls.read_common(read, generation_config, weight_formats=(_MXFP4,))
            | {"intermediate_size": moe.features, "activation": activation},
            attention=tuple(replace(layer, has_sinks=True) for layer in layers),
            qkv_bias=biased,
            o_bias=biased,
            moe=moe,
            is_sparse=(True,) * num_layers,
            in_mxfp4=weight_format(read) == _MXFP4,
        )


class GptOssForCausalLM(LlamaMoEForCausalLM):
    """gpt-oss."""

    config_class = GptOssConfig

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        super().map_weights(config, weights)
        for i, attention in enumerate(config.attention):
            share, parameter = weights.heads(attention.num_heads, 1), f"layers.{i}.self_attention.attention.sinks"
            weights.vector(f"model.layers.{i}.self_attn.sinks", parameter, share)

    @classmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """See `LlamaMoEForCausalLM.map_experts`."""
        assert isinstance(config, GptOssConfig)
        map_router(config, weights, f"{theirs}.mlp.router", ours)
        sizes = config.expert_sizes(weights)
        plain = weights.like()
        plain.extend(interleaved(sizes), theirs, ours)
        if not config.in_mxfp4:
            weights.include(plain)
            return
        quantized = weights.like()
        quantized.extend(interleaved_mxfp4(sizes), theirs, ours)
        weights.one_of(quantized, plain)
