"""The models that benchmarks run by name: shapes without weights.

Imports nothing but the standard library, as `benchmarks.llama_8b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import llama_8b
from benchmarks.published_models import PUBLISHED

LLAMA_3_2_1B: dict[str, Any] = {
    **llama_8b.SHAPE,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": {**llama_8b.SHAPE["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B: dict[str, Any] = {
    **PUBLISHED["Qwen3MoeForCausalLM"].config,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
GPT_OSS_20B: dict[str, Any] = {
    **PUBLISHED["GptOssForCausalLM"].config,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 200002,
    "pad_token_id": 199999,
}
"""In bfloat16."""

GPT_OSS_20B_MXFP4: dict[str, Any] = {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4"}}
"""As it was published: the experts are drawn in MXFP4, and a worker that decodes keeps them so."""

_DEEPSEEK: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_layer_freq": 1,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    **PUBLISHED["DeepseekV2ForCausalLM"].config,
    **_DEEPSEEK,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_V3: dict[str, Any] = {
    **PUBLISHED["DeepseekV3ForCausalLM"].config,
    **_DEEPSEEK,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DEEPSEEK_V3_STACK: dict[str, Any] = {**_V3, "num_hidden_layers": 6}
"""As many of DeepSeek-V3's 61 layers as one GPU of 141 GB holds beside a cache: three dense and three of experts."""

MOONLIGHT_16B_A3B: dict[str, Any] = {
    **_V3,
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rope_theta": 50000.0,
    "rope_scaling": None,
}
GLM_4_7_FLASH: dict[str, Any] = {
    **PUBLISHED["Glm4MoeLiteForCausalLM"].config,
    **_DEEPSEEK,
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 154820,
    "pad_token_id": 154820,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": llama_8b.SHAPE,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-20b-mxfp4": GPT_OSS_20B_MXFP4,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "moonlight-16b-a3b": MOONLIGHT_16B_A3B,
    "deepseek-v3-stack": DEEPSEEK_V3_STACK,
    "glm-4.7-flash": GLM_4_7_FLASH,
}
"""What config.json says, by the name that `--model` takes."""

MODEL_HELP = f"a folder with config.json, or one of {', '.join(SHAPES)}; default: {next(iter(SHAPES))}"


def model_folder(asked: Path | None, scratch: Path) -> Path:
    """The folder that `--model` means; of a shape that is named it is made in `scratch`."""
    name = next(iter(SHAPES)) if asked is None else str(asked)
    if name not in SHAPES:
        return Path(name)
    return llama_8b.save_shape(scratch / name, SHAPES[name])
