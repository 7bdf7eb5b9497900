"""A checkpoint whose config asks for another attention than its family's is refused by the key that says so."""

from __future__ import annotations

from typing import Any

import pytest

from workers.errors import CheckpointError
from workers.models.registry import parse_model

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
ASKED = {
    "alibi": True,
    "attention_chunk_size": 8192,
    "attention_multiplier": 0.015625,
    "attn_logit_softcapping": 50.0,
    "attn_output_gate": True,
    "attn_temperature_tuning": 4,
    "clip_qkv": 8.0,
    "cross_attention_layers": [1],
    "dual_chunk_attention_config": DUAL_CHUNK,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "full_attention_interval": 4,
    "index_topk": 2048,
    "is_causal": False,
    "kv_lora_rank": 512,
    "logits_scaling": 8.0,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 0],
    "num_kv_shared_layers": 10,
    "position_embedding_type": "absolute",
    "qk_layernorm": True,
    "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.22,
    "rope_interleave": True,
    "rope_interleaved": True,
    "sliding_window_pattern": 6,
    "sparse_attention_config": {"block_size": 64},
    "sparse_config": {"kernel_size": 32},
    "use_bidirectional_attention": True,
    "use_cla": True,
    "use_qk_norm": True,
}
NOTHING = {
    "embedding_multiplier": 1.0,
    "is_causal": True,
    "logits_scaling": 1,
    "no_rope_layers": [1, 1],
    "position_embedding_type": "rope",
    "residual_multiplier": 1.0,
}


def config(architecture: str, **more: Any) -> Any:
    return parse_model({**COMMON, "architectures": [architecture], **more}, source="dir/config.json")[1]


@pytest.mark.parametrize("key", ASKED)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_another_attention_is_refused_by_its_key(architecture: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"dir/config.json: {key}: .* is not supported: .*attention"):
        config(architecture, **{key: ASKED[key]})


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("key", ASKED)
def test_a_key_that_asks_for_nothing_is_no_reason(architecture: str, key: str) -> None:
    config(architecture, **{key: None})
    config(architecture, **{key: NOTHING.get(key, False)})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_dual_chunk_attention_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(CheckpointError, match=r"dual_chunk_attention_config: .*: dual chunk attention, which plain"):
        config(architecture, dual_chunk_attention_config=DUAL_CHUNK)


def test_qwen3_normalises_queries_and_keys_anyway() -> None:
    assert config("Qwen3ForCausalLM", use_qk_norm=True).qk_norm


@pytest.mark.parametrize(
    ("architecture", "window", "kinds", "accepted"),
    [
        ("LlamaForCausalLM", None, ["full_attention", "full_attention"], True),
        ("LlamaForCausalLM", 64, ["full_attention", "sliding_attention"], False),
        ("MistralForCausalLM", 64, ["sliding_attention", "sliding_attention"], True),
        ("MistralForCausalLM", 64, ["full_attention", "sliding_attention"], False),
        ("MistralForCausalLM", None, ["full_attention", "full_attention"], True),
        ("MistralForCausalLM", None, ["full_attention", "sliding_attention"], False),
    ],
)
def test_kinds_of_layers_in_a_family_of_one_kind(
    architecture: str, window: int | None, kinds: list[str], accepted: bool
) -> None:
    if accepted:
        read = config(architecture, sliding_window=window, layer_types=kinds)
        expected = window if architecture == "MistralForCausalLM" else None
        assert {layer.sliding_window for layer in read.attention} == {expected}
    else:
        with pytest.raises(CheckpointError, match=r"layer_types: '\w+' is not supported: all layers of this"):
            config(architecture, sliding_window=window, layer_types=kinds)
