"""Mistral 7B (arXiv:2310.06825): Llama's layers with a sliding window in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import FULL, SLIDING, read_attention, refuse_other_layer_types
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Mistral."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        window = read.optional_positive_int("sliding_window") if "sliding_window" in read else 4096
        refuse_other_layer_types(read, FULL if window is None else SLIDING)
        windows = (window,) * read.positive_int("num_hidden_layers")
        return cls(**cls.read_common(read, generation_config), attention=read_attention(read, windows))


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral."""

    config_class = MistralConfig
