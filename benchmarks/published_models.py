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
    "Glm4ForCausalLM": PublishedModel(
        "zai-org/GLM-4-9B-0414",
        {**_sizes(151552, 4096, 13696, 40, 32, 2, 32768), "head_dim": 128, "attention_bias": False},
    ),
    "GlmForCausalLM": PublishedModel(
        "zai-org/glm-4-9b-chat-hf",
        {**_sizes(151552, 4096, 13696, 40, 32, 2, 131072), "head_dim": 128},
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
    "Olmo2ForCausalLM": PublishedModel(
        "allenai/OLMo-2-1124-7B",
        {**_sizes(100352, 4096, 11008, 32, 32, 32, 4096), "rope_theta": 500000.0},
    ),
    "Phi3ForCausalLM": PublishedModel(
        "microsoft/phi-4",
        {**_sizes(100352, 5120, 17920, 40, 40, 10, 16384), "rope_theta": 250000.0, "sliding_window": None},
    ),
    "Qwen2ForCausalLM": PublishedModel(
        "Qwen/Qwen2.5-7B-Instruct",
        {**_sizes(152064, 3584, 18944, 28, 28, 4, 32768), "rope_theta": 1e6, "use_sliding_window": False},
        on_gpu="tiny, 1.5 billion: H200",
    ),
    "Qwen3ForCausalLM": PublishedModel(
        "Qwen/Qwen3-8B",
        {**_sizes(151936, 4096, 12288, 36, 32, 8, 40960), "head_dim": 128, "rope_theta": 1e6},
        on_gpu="tiny, 1.7 billion: H200",
    ),
    "SmolLM3ForCausalLM": PublishedModel(
        "HuggingFaceTB/SmolLM3-3B",
        {**_sizes(128256, 2048, 11008, 36, 16, 4, 65536), "rope_theta": 5e6},
    ),
}
"""By architecture, one each."""
