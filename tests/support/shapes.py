"""Shapes of random models: larger than the tiny checkpoint, and as large as a model of a billion parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MEDIUM: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.053,  # queries and keys as large as in the tiny checkpoint: attention matters
}
"""Overrides of the tiny checkpoint: kernels of the sizes that real models have, in a second."""

_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}
BILLION: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "mistral": (
        "Mistral",
        {
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 32768,
            "sliding_window": 512,
        },
    ),
    "qwen2": (
        "Qwen2",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
"""Shapes like Llama 3.2 1B, a small Mistral, Qwen2 1.5B and Qwen3 1.7B: prefix of the transformers classes, config."""


def billion_config(family: str) -> dict[str, Any]:
    """What config.json says of `BILLION[family]`: enough for random weights."""
    prefix, settings = BILLION[family]
    return {
        **_COMMON,
        "max_position_embeddings": 131072,
        "model_type": family,
        "architectures": [f"{prefix}ForCausalLM"],
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        **settings,
    }


def save_random_model(folder: Path, family: str, device: str = "cuda", seed: int = 0) -> None:
    """Write a checkpoint of `BILLION[family]` in bf16: what transformers draws, with norms and biases that differ."""
    import transformers

    prefix, settings = BILLION[family]
    config = getattr(transformers, f"{prefix}Config")(**_COMMON, **settings)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    with torch.device(device):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
