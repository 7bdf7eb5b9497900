"""A published model of every architecture, with what its config.json says of sizes, heads, windows and rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedModel:
    """A model that its makers published.

    Attributes:
        name: on the hub.
        config: its config.json, without what Baton does not read and what is its family's default.
        on_gpu: shapes of the family, with random weights, that were held against `transformers` on which GPU.
    """

    name: str
    config: Mapping[str, Any]
    on_gpu: str = ""


def _sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
    }


_LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DEEPSEEK_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
_SHARED = {"n_shared_experts": 1, "moe_layer_freq": 1}
_GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_MAVERICK = {
    **_sizes(202048, 5120, 8192, 48, 40, 8, 1048576),
    "head_dim": 128,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "rope_theta": 500000.0,
    "use_qk_norm": False,
}

PUBLISHED: Mapping[str, PublishedModel] = {
    "Cohere2ForCausalLM": PublishedModel(
        "CohereLabs/c4ai-command-r7b-12-2024",
        {
            **_sizes(256000, 4096, 14336, 32, 32, 8, 132096),
            "rope_theta": 50000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "logit_scale": 0.25,
        },
    ),
    "DeepseekV2ForCausalLM": PublishedModel(
        "deepseek-ai/DeepSeek-V2-Lite",
        {
            **_sizes(102400, 2048, 10944, 27, 16, 16, 163840),
            **_LATENT,
            **_SHARED,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "topk_method": "greedy",
            "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "DeepseekV3ForCausalLM": PublishedModel(
        "deepseek-ai/DeepSeek-V3",
        {
            **_sizes(129280, 7168, 18432, 61, 128, 128, 163840),
            **_LATENT,
            **_SHARED,
            "q_lora_rank": 1536,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "Gemma2ForCausalLM": PublishedModel(
        "google/gemma-2-9b-it",
        {**_sizes(256000, 3584, 14336, 42, 16, 8, 8192), "head_dim": 256, "sliding_window": 4096},
    ),
    "Gemma3ForCausalLM": PublishedModel(
        "google/gemma-3-1b-it",
        {**_sizes(262144, 1152, 6912, 26, 4, 1, 32768), "head_dim": 256, "sliding_window": 512},
    ),
    "Gemma3ForConditionalGeneration": PublishedModel(
        "google/gemma-3-4b-it",
        {
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }
        },
    ),
    "Glm4ForCausalLM": PublishedModel(
        "zai-org/GLM-4-9B-0414",
        {**_sizes(151552, 4096, 13696, 40, 32, 2, 32768), "head_dim": 128, "attention_bias": False},
        on_gpu="tiny: H200",
    ),
    "Glm4MoeLiteForCausalLM": PublishedModel(
        "zai-org/GLM-4.7-Flash",
        {
            **_sizes(154880, 2048, 10240, 47, 20, 20, 202752),
            **_LATENT,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "q_lora_rank": 768,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "rope_theta": 1e6,
        },
    ),
    "GlmForCausalLM": PublishedModel(
        "zai-org/glm-4-9b-chat-hf",
        {**_sizes(151552, 4096, 13696, 40, 32, 2, 131072), "head_dim": 128},
        on_gpu="tiny: H200",
    ),
    "GptOssForCausalLM": PublishedModel(
        "openai/gpt-oss-20b",
        {
            **_sizes(201088, 2880, 2880, 24, 64, 8, 131072),
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "rope_scaling": _GPT_OSS_YARN,
        },
    ),
    "GraniteForCausalLM": PublishedModel(
        "ibm-granite/granite-3.3-8b-instruct",
        {
            **_sizes(49159, 4096, 12800, 40, 32, 8, 131072),
            "rope_theta": 1e7,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0078125,
            "residual_multiplier": 0.22,
            "logits_scaling": 16.0,
        },
        on_gpu="tiny: H200",
    ),
    "Llama4ForCausalLM": PublishedModel("meta-llama/Llama-4-Maverick-17B-128E, its text_config", _MAVERICK),
    "Llama4ForConditionalGeneration": PublishedModel(
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct", {"text_config": _MAVERICK}
    ),
    "LlamaForCausalLM": PublishedModel(
        "meta-llama/Llama-3.1-8B-Instruct",
        {**_sizes(128256, 4096, 14336, 32, 32, 8, 131072), "rope_theta": 500000.0, "rope_scaling": _LLAMA_3_1},
        on_gpu="tiny, 1.2 billion: H200",
    ),
    "MistralForCausalLM": PublishedModel(
        "mistralai/Mistral-7B-v0.1",
        {**_sizes(32000, 4096, 14336, 32, 32, 8, 32768), "sliding_window": 4096},
        on_gpu="tiny, 1 billion: H200",
    ),
    "MixtralForCausalLM": PublishedModel(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        {
            **_sizes(32000, 4096, 14336, 32, 32, 8, 32768),
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    ),
    "Olmo2ForCausalLM": PublishedModel(
        "allenai/OLMo-2-1124-7B",
        {**_sizes(100352, 4096, 11008, 32, 32, 32, 4096), "rope_theta": 500000.0},
        on_gpu="tiny: H200",
    ),
    "Phi3ForCausalLM": PublishedModel(
        "microsoft/phi-4",
        {**_sizes(100352, 5120, 17920, 40, 40, 10, 16384), "rope_theta": 250000.0, "sliding_window": None},
        on_gpu="tiny: H200",
    ),
    "Qwen2ForCausalLM": PublishedModel(
        "Qwen/Qwen2.5-7B-Instruct",
        {**_sizes(152064, 3584, 18944, 28, 28, 4, 32768), "rope_theta": 1e6, "use_sliding_window": False},
        on_gpu="tiny, 1.5 billion: H200",
    ),
    "Qwen2MoeForCausalLM": PublishedModel(
        "Qwen/Qwen1.5-MoE-A2.7B",
        {
            **_sizes(151936, 2048, 5632, 24, 16, 16, 8192),
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "rope_theta": 1e6,
            "use_sliding_window": False,
        },
    ),
    "Qwen3ForCausalLM": PublishedModel(
        "Qwen/Qwen3-8B",
        {**_sizes(151936, 4096, 12288, 36, 32, 8, 40960), "head_dim": 128, "rope_theta": 1e6},
        on_gpu="tiny, 1.7 billion: H200",
    ),
    "Qwen3MoeForCausalLM": PublishedModel(
        "Qwen/Qwen3-30B-A3B",
        {
            **_sizes(151936, 2048, 6144, 48, 32, 4, 40960),
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rope_theta": 1e6,
        },
    ),
    "SmolLM3ForCausalLM": PublishedModel(
        "HuggingFaceTB/SmolLM3-3B",
        {**_sizes(128256, 2048, 11008, 36, 16, 4, 65536), "rope_theta": 5e6},
        on_gpu="tiny: H200",
    ),
}
"""By architecture, one each."""
