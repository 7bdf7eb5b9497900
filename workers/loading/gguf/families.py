"""What a config.json of each family would have beside what all of them have, from a GGUF file's metadata.

Where a file says nothing, it is what llama.cpp computes with.
"""

from __future__ import annotations

from typing import Any

from workers.loading.config_reader import ConfigReader
from workers.loading.gguf.header import GgufHeader
from workers.loading.gguf.rope import read_rope_scaling, read_theta

_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Of the models whose scores are scaled by the hidden size of a head, and not by the head's own size."""


def llama(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    """Llama, Mistral, SmolLM2 and what else has their form."""
    return {
        **_rope(read, prefix, header),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def qwen2(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    """Qwen2 and Qwen2.5."""
    return {**_rope(read, prefix, header), "hidden_act": "silu", "use_sliding_window": False}


def qwen3(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    """Qwen3."""
    return {**qwen2(read, prefix, header), "attention_bias": "blk.0.attn_q.bias" in header.tensors}


def gemma2(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    """Gemma 2."""
    return {
        **_rope(read, prefix, header),
        **_gemma(read, prefix),
        "attn_logit_softcapping": read.positive_float(f"{prefix}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": read.positive_float(f"{prefix}.final_logit_softcapping", 30.0),
    }


def gemma3(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    """Gemma 3, text: layers with a window rotate by a base of their own and are not scaled."""
    cap = read.get(f"{prefix}.final_logit_softcapping")
    return {
        **_gemma(read, prefix),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None if not cap else read.positive_float(f"{prefix}.final_logit_softcapping"),
        "sliding_window_pattern": read.positive_int(f"{prefix}.attention.sliding_window_pattern", 6),
        "rope_parameters": {
            "full_attention": {
                **(read_rope_scaling(read, prefix, header) or {"rope_type": "default"}),
                "rope_theta": read_theta(read, f"{prefix}.rope.freq_base", 1e6),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": read_theta(read, f"{prefix}.rope.freq_base_swa", 10000.0),
            },
        },
    }


def _rope(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    scaling = read_rope_scaling(read, prefix, header) or {"rope_type": "default"}
    return {"rope_parameters": {**scaling, "rope_theta": read_theta(read, f"{prefix}.rope.freq_base", 10000.0)}}


def _gemma(read: ConfigReader, prefix: str) -> dict[str, Any]:
    num_heads = read.positive_int(f"{prefix}.attention.head_count")
    hidden_size = read.positive_int(f"{prefix}.embedding_length")
    head_size = read.positive_int(f"{prefix}.attention.key_length", 256)
    is_27b = read.positive_int(f"{prefix}.block_count") == _GEMMA_27B_LAYERS[prefix]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_size,
        "sliding_window": read.positive_int(f"{prefix}.attention.sliding_window"),
    }
