"""Llama-4's language model: chunked local attention, layers without positions, experts that weigh what they read.

Of a checkpoint that reads images, too, this is the part that reads text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from attention.layers.attention import Attention
from workers.layers.moe.mlp import MoEConfig
from workers.layers.rotation import Rotation
from workers.layers.self_attention import SelfAttention
from workers.layers.temperature import AttentionTemperature
from workers.loading.config_reader import ConfigReader
from workers.loading.expert_weights import stacked
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.heads import FULL, read_heads, read_layer_types
from workers.models.config.model_config import ModelConfig
from workers.models.config.rope import RopeFamily, read_rope, read_rotating_layers
from workers.models.families.llama import make_head_norm, make_self_attention
from workers.models.families.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    map_router,
    map_shared_experts,
    read_num_experts,
    read_top_k,
)
from workers.models.weight_map import WeightMap
from workers.ops.rope_config import LongRopeScaling, YarnScaling
from workers.ops.router_config import RouterConfig

_CHUNKED = "chunked_attention"
_ROPE = RopeFamily(theta=500000.0, interleaved=True)


@dataclass(frozen=True, kw_only=True)
class Llama4TextConfig(LlamaMoEConfig):
    """Llama-4.

    Attributes:
        qk_length_norm: whether the heads of queries and keys that are rotated are brought to one length.
        temperature: of layers that rotate nothing; None: there is none.
    """

    qk_length_norm: bool
    temperature: AttentionTemperature | None

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        num_experts = read_num_experts(read)
        inner = read.positive_int("intermediate_size")
        moe = MoEConfig(
            router=RouterConfig(num_experts, read_top_k(read, num_experts), scores="sigmoid", weighs_input=True),
            intermediate_size=inner,
            shared_intermediate_size=inner,
        )
        biased, length_norm = read.flag("attention_bias"), read.flag("use_qk_norm")
        return cls(
            **cls.read_common(read, generation_config) | {"intermediate_size": moe.features},
            attention=_read_attention(read, length_norm),
            qkv_bias=biased,
            o_bias=biased,
            moe=moe,
            is_sparse=_read_sparse_layers(read),
            dense_intermediate_size=read.positive_int("intermediate_size_mlp"),
            qk_length_norm=length_norm,
            temperature=_read_temperature(read),
        )


@dataclass(frozen=True, kw_only=True)
class Llama4TextOfMultiModalConfig(Llama4TextConfig):
    """The language model of one that reads images, too."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config")
        return super().read(read.inside("text_config", shared), generation_config)


def _read_attention(read: ConfigReader, length_norm: bool) -> tuple[AttentionConfig, ...]:
    num_heads, num_kv_heads, size = read_heads(read, head_size=128)
    rope = read_rope(read, size, read.positive_int("max_position_embeddings"), _ROPE)
    if length_norm and isinstance(rope.scaling, YarnScaling | LongRopeScaling):
        raise read.error("use_qk_norm", "true is not supported with a rotation that scales queries and keys")
    rotates = read_rotating_layers(read, read.positive_int("num_hidden_layers"))
    types = read_layer_types(read, (FULL, _CHUNKED), [_CHUNKED if each else FULL for each in rotates])
    key = "attention_chunk_size"
    chunk = read.optional_positive_int(key) if key in read else read.positive_int(key)
    if chunk is None and _CHUNKED in types:
        raise read.error(key, f"is null, and layer_types has {_CHUNKED!r}")
    return tuple(
        AttentionConfig(
            num_heads,
            num_kv_heads,
            size,
            size**-0.5,
            rope if rotated else None,
            chunk_size=chunk if kind == _CHUNKED else None,
        )
        for rotated, kind in zip(rotates, types, strict=True)
    )


def _read_sparse_layers(read: ConfigReader) -> tuple[bool, ...]:
    num_layers = read.positive_int("num_hidden_layers")
    if read.get("moe_layers") is None:
        step = read.positive_int("interleave_moe_layer_step")
        return tuple((i + 1) % step == 0 for i in range(num_layers))
    stated = read.int_list("moe_layers")
    wrong = [layer for layer in stated if not 0 <= layer < num_layers]
    if wrong:
        raise read.error("moe_layers", f"names layer {wrong[0]} of {num_layers}")
    return tuple(i in stated for i in range(num_layers))


def _read_temperature(read: ConfigReader) -> AttentionTemperature | None:
    """Old configs state a number for `attn_temperature_tuning`, of which only counts whether it is 0."""
    key = "attn_temperature_tuning"
    tuned = read.get_or_default(key)
    if not isinstance(tuned, int):
        raise read.error(key, f"must be true or false, not {tuned!r}")
    if not tuned:
        return None
    return AttentionTemperature(read.non_negative_float("attn_scale"), read.positive_float("floor_scale"))


class Llama4ForCausalLM(LlamaMoEForCausalLM):
    """Llama-4 as a language model alone."""

    config_class = Llama4TextConfig
    config: Llama4TextConfig
    mlp_name: ClassVar[str] = "feed_forward"

    def make_self_attention(self, index: int, attention: Attention, rotation: Rotation) -> SelfAttention:
        """See `LlamaMoEForCausalLM.make_self_attention`."""
        config, context = self.config, self.context
        if config.attention[index].rope is None:
            return make_self_attention(config, attention, rotation, context, temperature=config.temperature)
        norm = make_head_norm(config, attention, context, weighted=False) if config.qk_length_norm else None
        return make_self_attention(config, attention, rotation, context, head_norm=norm)

    @classmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """See `LlamaMoEForCausalLM.map_experts`."""
        name = cls.mlp_name
        map_router(config, weights, f"{theirs}.{name}.router", ours)
        weights.extend(stacked(config.expert_sizes(weights), f"{name}.experts"), theirs, ours)
        map_shared_experts(config, weights, theirs, ours, f"{name}.shared_expert")


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """The language model of a checkpoint that reads images, too."""

    config_class = Llama4TextOfMultiModalConfig

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        super().map_weights(config, weights)
        weights.text_of_multi_modal(others=("vision_model", "multi_modal_projector"))
