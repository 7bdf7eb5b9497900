"""A GGUF file's metadata as the config.json that a checkpoint in Hugging Face format has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.loading.config_reader import ConfigReader
from workers.loading.gguf.architectures import architecture_of
from workers.loading.gguf.end_tokens import end_token_ids
from workers.loading.gguf.header import GgufHeader, read_header
from workers.loading.stored_tensor import StoredTensor

_EMBEDDING = "token_embd.weight"


def gguf_config(file: Path) -> dict[str, Any]:
    """What config.json would hold.

    Raises:
        CheckpointError: the file is no whole GGUF file, its architecture is not supported, or a key of its metadata is
            missing or out of range; names file and key.
    """
    header = read_header(file, string_lists=True)
    architecture = architecture_of(header)
    prefix = header.metadata["general.architecture"]
    read = ConfigReader(header.metadata, str(file))
    common = _common(read, prefix, header)
    return {
        **common,
        **architecture.settings(read, prefix, header),
        "architectures": [architecture.name],
        "dtype": dtype_of(header.tensors.values()),
    }


def dtype_of(tensors: Iterable[StoredTensor]) -> str:
    """What the model runs in where nothing else is said.

    A file of float32 or of float16 alone (and norms) in that, and any other in bfloat16: it keeps more of a number than
    most blocks do, and its range is that of float32.
    """
    kinds = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")


def _common(read: ConfigReader, prefix: str, header: GgufHeader) -> dict[str, Any]:
    if experts := read.get(f"{prefix}.expert_count"):
        raise read.error(f"{prefix}.expert_count", f"{experts!r} is not supported, experts are not read from GGUF")
    num_heads, hidden_size = (
        read.positive_int(f"{prefix}.{key}") for key in ("attention.head_count", "embedding_length")
    )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": read.positive_int(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": read.positive_int(f"{prefix}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": read.positive_int(f"{prefix}.attention.head_count_kv", num_heads),
        "head_dim": _head_size(read, prefix, hidden_size // num_heads),
        "rms_norm_eps": read.positive_float(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": read.positive_int(f"{prefix}.context_length"),
        "vocab_size": _vocab_size(read, header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": read.optional_int("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_token_ids(header),
    }


def _head_size(read: ConfigReader, prefix: str, default: int) -> int:
    keys = [f"{prefix}.{key}" for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")]
    sizes = {key: size for key in keys if (size := read.optional_positive_int(key)) is not None}
    size = next(iter(sizes.values()), default)
    for key, other in sizes.items():
        if other != size:
            raise read.error(key, f"{other} is not supported beside heads of {size}")
    return size


def _vocab_size(read: ConfigReader, header: GgufHeader) -> int:
    embedding = header.tensors.get(_EMBEDDING)
    if embedding is None:
        raise read.error(_EMBEDDING, "is missing")
    return embedding.shape[0]
