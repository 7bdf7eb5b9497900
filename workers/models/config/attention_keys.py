"""Keys of a config.json that make a checkpoint's attention another one than its family's.

Checkpoints made for another engine, or with code of their own, keep their family's name and say so in a key that the
family does not have. Plain attention would give an answer, and a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from workers.loading.config_reader import ConfigReader

_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "alibi": "ALiBi",
        "attention_chunk_size": "chunked local attention",
        "attention_multiplier": "a scale of its own for attention",
        "attn_logit_softcapping": "soft-capped attention",
        "attn_output_gate": "gated attention",
        "attn_temperature_tuning": "attention scaled by position",
        "clip_qkv": "clipped queries, keys and values",
        "cross_attention_layers": "cross attention",
        "dual_chunk_attention_config": "dual chunk attention",
        "embedding_multiplier": "scaled embeddings",
        "final_logit_softcapping": "soft-capped logits",
        "full_attention_interval": "linear attention",
        "index_topk": "sparse attention",
        "is_causal": "attention in both directions",
        "kv_lora_rank": "multi-head latent attention",
        "logits_scaling": "scaled logits",
        "no_rope_layer_interval": "layers without rotary embedding",
        "no_rope_layers": "layers without rotary embedding",
        "num_kv_shared_layers": "layers that share their keys and values",
        "position_embedding_type": "positions that are not rotary",
        "qk_layernorm": "normalised queries and keys",
        "query_pre_attn_scalar": "a scale of its own for attention",
        "residual_multiplier": "a scaled residual stream",
        "rope_interleave": "rotary embedding of neighbouring elements",
        "rope_interleaved": "rotary embedding of neighbouring elements",
        "sliding_window_pattern": "windows in a pattern of layers",
        "sparse_attention_config": "sparse attention",
        "sparse_config": "sparse attention",
        "use_bidirectional_attention": "attention in both directions",
        "use_cla": "layers that share their keys and values",
        "use_qk_norm": "normalised queries and keys",
    }
)
_UNCHANGED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "embedding_multiplier": (1,),
        "is_causal": (True,),
        "logits_scaling": (1,),
        "position_embedding_type": ("rope", "rotary"),
        "residual_multiplier": (1,),
    }
)
"""Values that change nothing, beside null, false, zero and what is empty."""


def refuse_other_attention(read: ConfigReader) -> None:
    """Refuse a config whose keys ask for an attention that the family does not have: keys that it has not read.

    Args:
        read: config.json, as its family has read it.

    Raises:
        CheckpointError: names file, key and value, and what they stand for.
    """
    asked, values = read.asked, read.values
    for key, meaning in _MEANINGS.items():
        value = values.get(key)
        if key not in asked and _changes(key, value):
            raise read.error(key, f"{value!r} is not supported: {meaning}, which plain attention would get wrong")
    for part in read.parts:
        refuse_other_attention(part)


def _changes(key: str, value: Any) -> bool:
    if value is None or value in _UNCHANGED.get(key, ()):
        return False
    if key in _UNCHANGED:
        return True
    if key == "no_rope_layers" and isinstance(value, list):  # 1: the layer has it
        return not all(value)
    return bool(value)
