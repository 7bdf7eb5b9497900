"""What dense families read of config.json: transformers' defaults for what is absent, every published spelling."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from workers.errors import CheckpointError
from workers.models.config.model_config import ModelConfig
from workers.models.registry import ARCHITECTURES, parse_model
from workers.ops.rope_config import LongRopeScaling

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
DENSE = [
    "Cohere2ForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
]
OF_32_HEADS = {"MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Those whose default number of key/value heads is for 32 heads, whatever is stated."""


def read(architecture: str, **more: Any) -> Any:
    return parse_model({**SIZES, "architectures": [architecture], **more})[1]


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.sliding_window for layer in config.attention]


def rotates(config: ModelConfig) -> list[bool]:
    return [layer.rope is not None for layer in config.attention]


@pytest.mark.parametrize("architecture", DENSE)
def test_what_is_absent_is_what_transformers_takes(architecture: str) -> None:
    stated = {"num_key_value_heads": 2} if architecture in OF_32_HEADS else {}
    ours = read(architecture, **stated)
    theirs = AutoConfig.for_model(ARCHITECTURES[architecture].model_type, **SIZES, **stated)
    eps = theirs.layer_norm_eps if architecture == "Cohere2ForCausalLM" else theirs.rms_norm_eps
    assert (ours.norm_eps, ours.tie_word_embeddings) == (eps, theirs.tie_word_embeddings)
    head_size = getattr(theirs, "head_dim", None) or 32
    for layer in ours.attention:
        assert (layer.num_heads, layer.head_size) == (4, head_size)
        assert layer.scale == getattr(theirs, "attention_multiplier", head_size**-0.5)
        assert layer.rope is None or layer.rope.theta == theirs.rope_parameters["rope_theta"]
    assert {layer.num_kv_heads for layer in ours.attention} == {theirs.num_key_value_heads}
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 8
    window = getattr(theirs, "sliding_window", None)
    assert windows(ours) == [window if kind == "sliding_attention" else None for kind in kinds]


def test_granites_factors() -> None:
    config = read(
        "GraniteForCausalLM",
        embedding_multiplier=12,
        attention_multiplier=0.0078125,
        residual_multiplier=0.22,
        logits_scaling=16.0,
    )
    assert (config.embedding_scale, config.residual_scale, config.logits_scale) == (12.0, 0.22, 1 / 16)
    assert {layer.scale for layer in config.attention} == {0.0078125}
    with pytest.raises(CheckpointError, match="logits_scaling: must be a number above 0, not 0"):
        read("GraniteForCausalLM", logits_scaling=0)


def test_cohere2s_pattern_in_both_spellings() -> None:
    expected = [4096, 4096, None, 4096, 4096, None, 4096, 4096]
    types = ["full_attention" if window is None else "sliding_attention" for window in expected]
    for spelling in ({"sliding_window_pattern": 3}, {"layer_types": types}):
        config = read("Cohere2ForCausalLM", **spelling)
        assert windows(config) == expected
        assert rotates(config) == [window is not None for window in expected]


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("use_parallel_block", False, True),
        ("use_gated_activation", False, True),
        ("use_qk_norm", True, False),
        ("position_embedding_type", "alibi", "rope_gptj"),
        ("rotary_pct", 0.5, 1.0),
    ],
)
def test_cohere2_refuses_what_it_does_not_compute(key: str, value: Any, supported: Any) -> None:
    read("Cohere2ForCausalLM", **{key: supported})
    message = f"{key}: {value!r} is not supported for this architecture, only {supported!r}"
    with pytest.raises(CheckpointError, match=message):
        read("Cohere2ForCausalLM", **{key: value})


@pytest.mark.parametrize(("stated", "window"), [(2047, 2047), (8191, 8191), (8192, None), (262144, None), (None, None)])
def test_a_window_as_long_as_phi3s_context_is_none(stated: int | None, window: int | None) -> None:
    assert windows(read("Phi3ForCausalLM", sliding_window=stated)) == [window] * 8


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3s_names_of_longrope(kind: str) -> None:
    config = read(
        "Phi3ForCausalLM",
        partial_rotary_factor=0.75,
        rope_scaling={**LONGROPE, "type": kind},
        original_max_position_embeddings=2048,
    )
    rope = config.attention[0].rope
    assert rope.rotary_dim(32) == 24
    assert isinstance(rope.scaling, LongRopeScaling)
    assert rope.scaling.original_max_position_embeddings == 2048
    assert (config.fused_qkv, config.fused_gate_up) == (True, True)


@pytest.mark.parametrize("architecture", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_glm_rotates_half_a_head_in_pairs(architecture: str) -> None:
    config = read(architecture)
    assert config.attention[0].rope.interleaved
    assert config.attention[0].rope.rotary_dim(128) == 64
    assert (config.qkv_bias, config.o_bias, config.fused_gate_up) == (True, False, True)
    assert read(architecture, partial_rotary_factor=0.25).attention[0].rope.rotary_dim(128) == 32


def test_smollm3s_layers_without_positions() -> None:
    assert rotates(read("SmolLM3ForCausalLM")) == [True, True, True, False] * 2
    chosen = [1, 0, 1, 1, 1, 1, 1, 0]
    config = read("SmolLM3ForCausalLM", no_rope_layers=chosen, use_sliding_window=True, sliding_window=16)
    assert rotates(config) == [number == 1 for number in chosen]
    assert windows(config) == [None if number else 16 for number in chosen]
