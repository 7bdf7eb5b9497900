"""SmolLM3 (Hugging Face, 2025): Llama's layers, every fourth without positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.config.rope import RopeFamily, read_rotating_layers
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LlamaConfig):
    """SmolLM3."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        biased = read.flag("attention_bias")
        rotating = read_rotating_layers(read, read.positive_int("num_hidden_layers"))
        layers = read_attention(read, _windows(read, rotating), rope=RopeFamily(theta=2e6))
        return cls(
            **cls.read_common(read, generation_config),
            attention=tuple(
                layer if rotates else replace(layer, rope=None) for layer, rotates in zip(layers, rotating, strict=True)
            ),
            qkv_bias=biased,
            o_bias=biased,
            mlp_bias=read.flag("mlp_bias"),
        )


def _windows(read: ConfigReader, rotating: tuple[bool, ...]) -> tuple[int | None, ...]:
    """For each layer how many tokens a query sees; where not stated otherwise those without positions have a window."""
    window = read.optional_positive_int("sliding_window") if read.flag("use_sliding_window") else None
    default = [FULL if rotates or window is None else SLIDING for rotates in rotating]
    return windows_of(read_layer_types(read, (FULL, SLIDING), default), window)


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3."""

    config_class = SmolLM3Config
