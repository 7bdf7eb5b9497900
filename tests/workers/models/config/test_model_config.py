from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workers.errors import CheckpointError
from workers.models.config.model_config import ModelConfig
from workers.ops.rope_config import Llama3Scaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_ONLY = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8_SCHEME, "ignore": []}
QWEN = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def test_llama() -> None:
    config = ModelConfig.from_dict(LLAMA)
    assert config.family == "llama"
    assert (config.head_size, config.num_kv_heads, config.dtype) == (16, 2, "bfloat16")
    assert config.rope.theta == 500000.0
    assert config.rope.scaling is None
    assert config.sliding_windows == (None, None, None)
    flags = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings)
    assert not any(flags)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_biases_follow_the_family() -> None:
    biased = ModelConfig.from_dict({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias
    qwen2 = ModelConfig.from_dict(QWEN)
    assert qwen2.qkv_bias
    assert not qwen2.o_bias
    qwen3 = ModelConfig.from_dict({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qk_norm
    assert not qwen3.qkv_bias
    assert qwen3.head_size == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **SCALING}},
    ],
)
def test_both_spellings_of_rope(rope: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**LLAMA, **rope})
    assert config.rope.theta == 500000.0
    assert config.rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


def test_sliding_windows() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_dict({**mistral, "sliding_window": 7}).sliding_windows == (7, 7, 7)
    assert ModelConfig.from_dict({**mistral, "sliding_window": None}).sliding_windows == (None, None, None)
    assert ModelConfig.from_dict(mistral).sliding_windows == (4096, 4096, 4096)
    windowed = {**QWEN, "sliding_window": 9, "max_window_layers": 2}
    assert ModelConfig.from_dict(windowed).sliding_windows == (None, None, None)
    windowed["use_sliding_window"] = True
    assert ModelConfig.from_dict(windowed).sliding_windows == (None, None, 9)
    windowed["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    assert ModelConfig.from_dict(windowed).sliding_windows == (9, None, None)


def test_end_of_sequence_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": [2, 7]}))
    assert ModelConfig.from_file(tmp_path).eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert ModelConfig.from_file(tmp_path).eos_token_ids == (2, 7, 9)
    assert ModelConfig.from_dict({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


def test_the_family_comes_from_model_type_where_no_architecture_is_stated() -> None:
    assert ModelConfig.from_dict({**LLAMA, "architectures": None, "model_type": "mistral"}).family == "mistral"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures: \['GPT2LMHeadModel'\] is not supported.*Qwen3ForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "model_type: 'gpt2' is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: must be a list"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"vocab_size": None}, "vocab_size: is missing"),
        ({"vocab_size": "512"}, "vocab_size: must be an integer, not '512'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads: must be an integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"hidden_size": 66}, "head_dim: is missing, and 4 heads do not divide hidden_size 66"),
        ({"head_dim": 15}, "head_dim: must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn' is not supported"),
        ({"eos_token_id": "2"}, "eos_token_id: must be an integer or a list"),
        ({"quantization_config": "fp8"}, "quantization_config: must be an object, not 'fp8'"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method: 'awq'.*quantized weights",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .* neither kv_cache_scheme nor"),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "weight_block_size": [8, 8],
                    "kv_cache_scheme": "static",
                }
            },
            "quantization_config.weight_block_size: .*quantized weights",
        ),
        (
            {"quantization_config": {**KV_ONLY, "config_groups": {"group_0": {"targets": ["Linear"]}}}},
            "quantization_config.config_groups: .*quantized weights",
        ),
        (
            {"quantization_config": {**KV_ONLY, "kv_cache_scheme": {**FP8_SCHEME, "type": "int"}}},
            "quantization_config.kv_cache_scheme: .*only an FP8 KV cache",
        ),
        (
            {"quantization_config": {**KV_ONLY, "kv_cache_scheme": {**FP8_SCHEME, "strategy": "attn_head"}}},
            "a scale a tensor",
        ),
        ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}}, "'NVFP4' is not"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type: 'linear' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per kind of layer"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling: must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        ModelConfig.from_dict({**LLAMA, **change}, source="/models/x/config.json")
    assert str(error.value).startswith("/models/x/config.json: ")


@pytest.mark.parametrize(
    "quantization",
    [
        KV_ONLY,
        {**KV_ONLY, "config_groups": None},
        {"quant_method": "fp8", "kv_cache_scheme": "static"},
        {"quant_method": "fp8", "kv_cache_scheme": FP8_SCHEME},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    ],
)
def test_the_cache_alone_may_be_quantized(quantization: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**LLAMA, "quantization_config": quantization})
    assert config == ModelConfig.from_dict(LLAMA)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(1, 8, 4), (2, 4, 2), (4, 2, 1), (8, 1, 1)])
def test_a_ranks_share(size: int, heads: int, kv_heads: int) -> None:
    whole = ModelConfig.from_dict({**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 517})
    shard = whole.sharded(size)
    assert (shard.num_heads, shard.num_kv_heads, shard.intermediate_size) == (heads, kv_heads, 96 // size)
    same = ("hidden_size", "head_size", "vocab_size", "num_layers", "qk_norm", "rope")
    assert all(getattr(shard, name) == getattr(whole, name) for name in same)
    assert 517 <= whole.vocab_share(size) * size < 517 + size


def test_layer_types_must_fit() -> None:
    windowed = {**QWEN, "use_sliding_window": True, "sliding_window": 9}
    with pytest.raises(CheckpointError, match="layer_types: must be a list of 3"):
        ModelConfig.from_dict({**windowed, "layer_types": ["full_attention"]})
    with pytest.raises(CheckpointError, match="'chunked_attention' is not supported"):
        ModelConfig.from_dict({**windowed, "layer_types": ["chunked_attention"] * 3})


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "cannot be read"), ("[]", "JSON object")])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        ModelConfig.from_file(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_most_of_a_layer_comes_after_its_keys_and_values() -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8, "head_size": 128}
    layer = replace(ModelConfig.from_dict(LLAMA), **shape)
    projections = 4096 * (4096 + 2 * 1024), 4096 * 4096 + 3 * 4096 * 14336
    assert layer.share_after_attention(0) == projections[1] / sum(projections)
    assert 0.7 < layer.share_after_attention(8192) < layer.share_after_attention(512) < 0.9
