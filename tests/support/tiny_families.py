"""Families of models as tiny random checkpoints, and what varies within each: a row a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # large enough that attention matters and greedy choices are not near ties
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class TinyFamily:
    """A family.

    Attributes:
        prefix: of its classes in transformers.
        settings: of its config, on top of `COMMON`.
        variations: further settings, by name, that every test of all families runs with, too.
        config: prefix of its config's class, where that is another.
    """

    prefix: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: str | None = None


FAMILIES: dict[str, TinyFamily] = {
    "gemma2": TinyFamily(
        "Gemma2",
        {"sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
        {
            "untied-biased": {
                "tie_word_embeddings": False,
                "attention_bias": True,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            "layer-types": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        },
    ),
    "gemma3": TinyFamily(
        "Gemma3",
        {"sliding_window": 20, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
        {
            "scaled": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
            },
            "capped-biased": {"final_logit_softcapping": 10.0, "attention_bias": True, "tie_word_embeddings": False},
        },
        config="Gemma3Text",
    ),
    "llama": TinyFamily(
        "Llama",
        variations={
            "tied": {"tie_word_embeddings": True},
            "biased-mha": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
            "wide-heads": {"head_dim": 40, "vocab_size": 517},
        },
    ),
    "llama3": TinyFamily("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": TinyFamily("Mistral", {"sliding_window": 24}, {"no-window": {"sliding_window": None}}),
    "qwen2": TinyFamily(
        "Qwen2",
        variations={
            "tied": {"tie_word_embeddings": True},
            "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        },
    ),
    "qwen3": TinyFamily(
        "Qwen3",
        {"head_dim": 32},
        {
            "tied-biased": {"tie_word_embeddings": True, "attention_bias": True},
            "window": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
        },
    ),
}


def variations() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Every family as it is and with each of its variations: (family, overrides) by name."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, family in FAMILIES.items():
        found[name] = (name, {})
        found.update({f"{name}-{suffix}": (name, overrides) for suffix, overrides in family.variations.items()})
    return found
