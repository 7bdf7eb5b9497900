"""The models that benchmarks run by name: shapes without weights.

Imports nothing but the standard library, as `benchmarks.llama_8b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import llama_8b
from benchmarks.published_models import PUBLISHED

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
"""In bfloat16, not in MXFP4, which Baton would turn into bfloat16."""

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": llama_8b.SHAPE,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
}
"""What config.json says, by the name that `--model` takes."""

MODEL_HELP = f"a folder with config.json, or one of {', '.join(SHAPES)}; default: {next(iter(SHAPES))}"


def model_folder(asked: Path | None, scratch: Path) -> Path:
    """The folder that `--model` means; of a shape that is named it is made in `scratch`."""
    name = next(iter(SHAPES)) if asked is None else str(asked)
    if name not in SHAPES:
        return Path(name)
    return llama_8b.save_shape(scratch / name, SHAPES[name])
