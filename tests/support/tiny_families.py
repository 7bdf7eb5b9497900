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
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "truncate": False}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
}


@dataclass(frozen=True)
class TinyFamily:
    """A family.

    Attributes:
        prefix: of its classes in transformers.
        settings: of its config, on top of `COMMON`.
        variations: further settings, by name, that every test of all families runs with, too.
        config: the prefix of its config's class; None: `prefix`.
        backends: of attention, that it runs with on a CPU.
    """

    prefix: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: str | None = None
    backends: tuple[str, ...] = ("CPU_ATTN", "TORCH_SDPA")


_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}

FAMILIES: dict[str, TinyFamily] = {
    "deepseek_v2": TinyFamily(
        "DeepseekV2",
        {**_LATENT, **_EXPERTS, "topk_method": "greedy"},
        {
            "compressed": {
                "q_lora_rank": 28,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 1.5,
                "rope_parameters": _DEEPSEEK_YARN,
            },
            "biased": {"attention_bias": True, "first_k_dense_replace": 0, "tie_word_embeddings": True},
            "biased-compressed": {"attention_bias": True, "q_lora_rank": 28, "first_k_dense_replace": 5},
        },
        backends=("CPU_MLA",),
    ),
    "deepseek_v3": TinyFamily(
        "DeepseekV3",
        {**_LATENT, **_EXPERTS, "q_lora_rank": 28, "n_group": 4, "topk_group": 2, "rope_parameters": _DEEPSEEK_YARN},
        {
            "moonlight": {
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 2.446,
                "rms_norm_eps": 1e-2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
            },
            "halves": {"rope_interleave": False, "norm_topk_prob": False, "n_shared_experts": 1},
        },
        backends=("CPU_MLA",),
    ),
    "glm4_moe_lite": TinyFamily(
        "Glm4MoeLite",
        {**_LATENT, **_EXPERTS, "q_lora_rank": 28, "rms_norm_eps": 1e-5},
        {"layer-types": {"mlp_layer_types": ["sparse", "dense", "sparse"]}},
        backends=("CPU_MLA",),
    ),
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
    "cohere2": TinyFamily(
        "Cohere2",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 24,
            "logit_scale": 0.25,
        },
        {"untied-biased": {"tie_word_embeddings": False, "attention_bias": True}},
    ),
    "glm": TinyFamily(
        "Glm", variations={"whole-unbiased": {"attention_bias": False, "partial_rotary_factor": 1.0, "head_dim": 32}}
    ),
    "glm4": TinyFamily("Glm4", variations={"tied-unbiased": {"tie_word_embeddings": True, "attention_bias": False}}),
    "gpt_oss": TinyFamily(
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0},
        },
        {
            "unbiased": {"attention_bias": False, "swiglu_limit": 2.0, "swiglu_alpha": 1.2},
            "upside-down": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        },
    ),
    "granite": TinyFamily(
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
        {"tied-biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
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
    "llama4": TinyFamily(
        "Llama4",
        {
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": 32,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
        {
            "interleaved": {
                "interleave_moe_layer_step": 2,
                "use_qk_norm": False,
                "num_experts_per_tok": 2,
                "no_rope_layers": [0, 1, 1, 0],
            },
            "untuned": {"moe_layers": [0], "attn_temperature_tuning": False, "attention_bias": True},
            "llama3-rope": {"rope_parameters": _LLAMA3_ROPE},
        },
        config="Llama4Text",
    ),
    "mistral": TinyFamily("Mistral", {"sliding_window": 24}, {"no-window": {"sliding_window": None}}),
    "mixtral": TinyFamily(
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"window": {"sliding_window": 20, "num_experts_per_tok": 1}},
    ),
    "olmo2": TinyFamily("Olmo2", variations={"biased-mha": {"attention_bias": True, "num_key_value_heads": 4}}),
    "phi3": TinyFamily(
        "Phi3",
        variations={
            "window": {"sliding_window": 24, "num_key_value_heads": 4},
            "tied-longrope": {
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "rope_parameters": _LONGROPE,
                "original_max_position_embeddings": 2048,  # all that is served: its short set is for every length
            },
        },
    ),
    "qwen2": TinyFamily(
        "Qwen2",
        variations={
            "tied": {"tie_word_embeddings": True},
            "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        },
    ),
    "qwen2_moe": TinyFamily(
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        {
            "window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "qkv_bias": False},
            "some-dense": {"decoder_sparse_step": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
            "odd-shared": {"shared_expert_intermediate_size": 48},
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
    "qwen3_moe": TinyFamily(
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        {
            "some-dense": {"mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True},
            "window": {"use_sliding_window": True, "sliding_window": 20},
        },
    ),
    "smollm3": TinyFamily(
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1]},
        {
            "window": {"use_sliding_window": True, "sliding_window": 20},
            "untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
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
