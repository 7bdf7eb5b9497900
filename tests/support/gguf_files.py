"""GGUF files out of tiny checkpoints, as llama.cpp's converter writes them, with the `gguf` package's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

MIXED = {
    "token_embd": Type.Q8_0,
    "output": Type.Q5_1,
    "attn_q": Type.Q4_0,
    "attn_k": Type.Q4_1,
    "attn_v": Type.Q5_0,
    "attn_output": Type.F16,
    "ffn_gate": Type.Q4_1,
    "ffn_up": Type.BF16,
    "ffn_down": Type.Q8_0,
}
"""A format for each kind of tensor; what is not named is F32, as norms and biases always are."""

K_BLOCKS = {**MIXED, "ffn_down": Type.Q6_K, "attn_output": Type.Q4_0, "ffn_up": Type.Q8_0}
"""The same with a format that has blocks of 256 numbers, for an MLP of as many inner features."""

_SCALES = {Type.Q4_K: (0, 4), Type.Q6_K: (208, 210)}
"""Where the float16 scales of a block lie."""

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_gguf(
    checkpoint: Path,
    file: Path,
    types: Mapping[str, Type] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The model and the tokenizer of a tiny checkpoint as a GGUF file.

    Args:
        checkpoint: a folder of `tiny_checkpoint`.
        file: to be written.
        types: how each kind of tensor is stored, such as {"attn_q": Type.Q4_0}; None: all in F32.
        metadata: more keys, or other values; None leaves a key out.
        tensors: more tensors.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(file, architecture)
    keys = {**_model_keys(architecture, config), **tokenizer_keys(checkpoint, config["vocab_size"]), **(metadata or {})}
    for key, value in keys.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config["num_hidden_layers"]
    )
    for theirs, tensor in load_file(checkpoint / "model.safetensors").items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        kind = (types or {}).get(name.split(".")[-2], Type.F32) if tensor.dim() > 1 else Type.F32
        _add_tensor(writer, name, _converted(architecture, theirs, tensor.float().numpy(), config), kind)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tokenizer_keys(checkpoint: Path, vocab_size: int) -> dict[str, Any]:
    """The byte-level tokenizer of a tiny checkpoint."""
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = (
            token,
            int(gguf.TokenType.CONTROL if token_id < 3 else gguf.TokenType.NORMAL),
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def write_vocabulary(file: Path, keys: Mapping[str, Any], architecture: str = "llama") -> Path:
    """A file without a model: what a tokenizer is made of.

    Args:
        file: to be written.
        keys: what follows `tokenizer.ggml.` in its metadata; None leaves one out.
        architecture: of the model that is not there.
    """
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in keys.items():
        _add(writer, key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def blocks(kind: Type, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, bytes) uint8: random blocks of a format that nothing quantises to here, with scales of about 1/1000."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    begin, end = _SCALES[kind]
    scales = rng.uniform(0.0005, 0.001, (len(made), (end - begin) // 2)).astype(np.float16)
    made[:, begin:end] = scales.view(np.uint8)
    return made.reshape(rows, -1)


def _model_keys(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    if architecture == "gemma3":
        keys |= {"rope.freq_base": 1e6, "attention.sliding_window_pattern": config["sliding_window_pattern"]}
    else:
        keys["rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
    if architecture.startswith("gemma"):
        keys["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma2":
        keys |= {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _converted(architecture: str, name: str, numbers: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """In llama.cpp's form: heads of Llama in pairs that rotate together, 1 added to Gemma's norms."""
    for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if architecture == "llama" and f".{part}." in name:
            heads = config[key]
            halves = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
            return halves.swapaxes(1, 2).reshape(numbers.shape)
    return numbers + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else numbers


def _add_tensor(writer: gguf.GGUFWriter, name: str, numbers: np.ndarray, kind: Type) -> None:
    if kind in _SCALES:
        writer.add_tensor(name, blocks(kind, *numbers.shape, seed=len(name)), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(numbers), kind), raw_dtype=kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None and key != "general.architecture":
        adders[type(value)](key, value)
