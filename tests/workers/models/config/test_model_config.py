from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workers.errors import CheckpointError, ConfigError
from workers.loading.quantized_storage import Fp8BlockStorage
from workers.models.config.model_config import ModelConfig
from workers.models.registry import parse_model, read_model
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


def read_config(*config: Any, **options: Any) -> Any:
    return parse_model(*config, **options)[1]


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    return tuple(layer.sliding_window for layer in config.attention)


def test_llama() -> None:
    config = read_config(LLAMA)
    assert config.family == "llama"
    assert (config.attention[0].head_size, config.attention[0].num_kv_heads, config.dtype) == (16, 2, "bfloat16")
    assert config.attention[0].rope.theta == 500000.0
    assert config.attention[0].rope.scaling is None
    assert windows(config) == (None, None, None)
    flags = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings)
    assert not any(flags)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_biases_follow_the_family() -> None:
    biased = read_config({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias
    qwen2 = read_config(QWEN)
    assert qwen2.qkv_bias
    assert not qwen2.o_bias
    qwen3 = read_config({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qk_norm
    assert not qwen3.qkv_bias
    assert qwen3.attention[0].head_size == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **SCALING}},
    ],
)
def test_both_spellings_of_rope(rope: dict[str, Any]) -> None:
    config = read_config({**LLAMA, **rope})
    assert config.attention[0].rope.theta == 500000.0
    assert config.attention[0].rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("scaling", "unasked", "most"),
    [
        ({}, 2048, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 2048, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 8192, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048, 2048),
        ({"rope_type": "llama3", **SCALING}, 2048, 2048),
    ],
)
def test_how_far_scaled_positions_reach(scaling: dict[str, Any], unasked: int, most: int) -> None:
    config = read_config({**LLAMA, "rope_scaling": scaling})
    assert config.context_length() == unasked
    assert config.context_length(most) == most
    assert config.context_length(100) == 100
    with pytest.raises(ConfigError, match=f"max_model_len is {most + 1}, the model has {most} positions"):
        config.context_length(most + 1)


def test_sliding_windows() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert windows(read_config({**mistral, "sliding_window": 7})) == (7, 7, 7)
    assert windows(read_config({**mistral, "sliding_window": None})) == (None, None, None)
    assert windows(read_config(mistral)) == (4096, 4096, 4096)
    windowed = {**QWEN, "sliding_window": 9, "max_window_layers": 2}
    assert windows(read_config(windowed)) == (None, None, None)
    windowed["use_sliding_window"] = True
    assert windows(read_config(windowed)) == (None, None, 9)
    windowed["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(read_config(windowed)) == (9, None, None)


def test_end_of_sequence_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": [2, 7]}))
    assert read_model(tmp_path)[1].eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert read_model(tmp_path)[1].eos_token_ids == (2, 7, 9)
    assert read_config({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|end|>", "added_tokens_decoder": {"9": {"content": "<|end|>"}}}}, 9),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|end|>"}}}, 8),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": "of the vocabulary"}}, 5),
        ({"tokenizer_config.json": {"eos_token": "nowhere"}}, None),
        ({"tokenizer_config.json": {"eos_token": "beyond"}}, None),
        ({"tokenizer_config.json": {"eos_token": None}}, None),
        ({}, None),
    ],
)
def test_the_tokenizers_own_end_of_sequence_counts_too(tmp_path: Path, files: dict[str, Any], eos: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    added = [{"content": content, "id": number} for content, number in (("<|end|>", 8), ("</s>", 2), ("beyond", 10**9))]
    model = {"vocab": {"of the vocabulary": 5}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": model}))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_model(tmp_path)[1].eos_token_ids == ((2,) if eos in (2, None) else (2, eos))


def test_the_family_comes_from_model_type_where_no_architecture_is_stated() -> None:
    assert read_config({**LLAMA, "architectures": None, "model_type": "mistral"}).family == "mistral"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures: \['GPT2LMHeadModel'\] is not supported.*Qwen3ForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "model_type: 'gpt2' is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: must be a list"),
        ({"hidden_act": "relu"}, "hidden_act: activation 'relu' is none of silu"),
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
                    "kv_cache_scheme": "int8",
                }
            },
            "quantization_config.kv_cache_scheme: 'int8' is not supported, only an FP8 KV cache",
        ),
        *(
            ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8], **change}}, message)
            for change, message in (
                ({"weight_block_size": [8]}, r"weight_block_size: must be the rows and columns of a block, not \[8\]"),
                ({"weight_block_size": 8}, "weight_block_size: must be the rows and columns of a block, not 8"),
                (
                    {"fmt": "e5m2"},
                    "quantization_config.fmt: 'e5m2' is not supported for this architecture, only 'e4m3'",
                ),
                ({"activation_scheme": "static"}, "quantization_config.activation_scheme: 'static' is not supported"),
                ({"weight_block_size": None, "activation_scheme": "static"}, "activation_scheme: .*quantized weights"),
            )
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
        ({"rope_scaling": {"rope_type": "axial"}}, "rope_scaling.rope_type: 'axial' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_config({**LLAMA, **change}, source="/models/x/config.json")
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
    config = read_config({**LLAMA, "quantization_config": quantization})
    assert config == read_config(LLAMA)


def test_weights_in_blocks_of_fp8() -> None:
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 64]}
    config = read_config({**LLAMA, "quantization_config": {**blocks, "kv_cache_scheme": "static"}})
    assert config.fp8_blocks == Fp8BlockStorage((128, 64))
    assert replace(config, fp8_blocks=None) == read_config(LLAMA)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(1, 8, 4), (2, 4, 2), (4, 2, 1), (8, 1, 1)])
def test_a_ranks_share(size: int, heads: int, kv_heads: int) -> None:
    whole = read_config({**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 517})
    shard = whole.attention[0].sharded(size)
    assert (shard.num_heads, shard.num_kv_heads) == (heads, kv_heads)
    assert replace(shard, num_heads=8, num_kv_heads=4) == whole.attention[0]
    assert 517 <= whole.vocab_share(size) * size < 517 + size


def test_layer_types_must_fit() -> None:
    windowed = {**QWEN, "use_sliding_window": True, "sliding_window": 9}
    with pytest.raises(CheckpointError, match="layer_types: must be a list of 3"):
        read_config({**windowed, "layer_types": ["full_attention"]})
    with pytest.raises(CheckpointError, match="'chunked_attention' is not supported"):
        read_config({**windowed, "layer_types": ["chunked_attention"] * 3})


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "cannot be read"), ("[]", "JSON object")])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model(tmp_path)[1]
    assert str(tmp_path / "config.json") in str(error.value)


def test_most_of_a_layer_comes_after_its_keys_and_values() -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 14336}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    layer = read_config({**LLAMA, **shape, **heads})
    projections = 4096 * (4096 + 2 * 1024), 4096 * 4096 + 3 * 4096 * 14336
    assert layer.share_after_attention(0) == projections[1] / sum(projections)
    assert 0.7 < layer.share_after_attention(8192) < layer.share_after_attention(512) < 0.9
