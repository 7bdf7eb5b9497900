"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's layers with biases, and windows in the upper layers where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from workers.loading.config_reader import ConfigReader
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Qwen2."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, read_windows(read)),
            qkv_bias=True,
        )


def read_windows(read: ConfigReader) -> tuple[int | None, ...]:
    """For each layer how many tokens a query sees, itself included; None: all.

    Raises:
        CheckpointError: the config says something else, or too little.
    """
    num_layers = read.positive_int("num_hidden_layers")
    window = read.optional_positive_int("sliding_window") if read.flag("use_sliding_window", False) else None
    if window is None:
        return (None,) * num_layers
    first = read.non_negative_int("max_window_layers", 28)
    types = read_layer_types(read, (FULL, SLIDING), [SLIDING if i >= first else FULL for i in range(num_layers)])
    return windows_of(types, window)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2."""

    config_class = Qwen2Config
