"""Gemma 3 (arXiv:2503.19786), text: Gemma 2's layers with normalised heads, and most of them with a window.

Layers with a window and layers without one rotate by bases of their own. Of a multi-modal checkpoint the text model
runs, and the rest is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.heads import FULL, SLIDING, read_heads, read_layer_types
from workers.models.config.model_config import ModelConfig
from workers.models.config.rope import RopeFamily, read_global_and_local_rope
from workers.models.families.gemma2 import Gemma2Config, Gemma2ForCausalLM, read_query_scale
from workers.models.weight_map import WeightMap

_ROPE = RopeFamily(theta=1e6)


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """The text model."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        if read.get("attn_logit_softcapping") is not None:
            raise read.error(
                "attn_logit_softcapping", f"{read.get('attn_logit_softcapping')!r} is not supported, only null"
            )
        return cls(**cls.read_gemma(read, generation_config), attention=_read_attention(read), qk_norm=True)


@dataclass(frozen=True, kw_only=True)
class Gemma3TextOfMultiModalConfig(Gemma3Config):
    """The text model of a multi-modal one."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "tie_word_embeddings", "quantization_config")
        return super().read(read.inside("text_config", shared), generation_config)


def _read_attention(read: ConfigReader) -> tuple[AttentionConfig, ...]:
    num_heads, num_kv_heads, head_size = read_heads(read, head_size=256)
    pattern = read.positive_int("sliding_window_pattern", 6)
    num_layers = read.positive_int("num_hidden_layers")
    types = read_layer_types(read, (FULL, SLIDING), [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)])
    full, local = read_global_and_local_rope(read, head_size, read.positive_int("max_position_embeddings"), _ROPE)
    scale, window = read_query_scale(read), read.positive_int("sliding_window")
    of_type = {
        FULL: AttentionConfig(num_heads, num_kv_heads, head_size, scale, full),
        SLIDING: AttentionConfig(num_heads, num_kv_heads, head_size, scale, local, window),
    }
    return tuple(of_type[kind] for kind in types)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3, text."""

    config_class = Gemma3Config


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text model of a multi-modal checkpoint."""

    config_class = Gemma3TextOfMultiModalConfig

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        super().map_weights(config, weights)
        weights.text_of_multi_modal(others=("vision_tower", "multi_modal_projector"))
