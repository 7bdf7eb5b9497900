"""The identity of what a model writes into its KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kv_transfer.identity import KVIdentity, digest_of
from workers.loading.gguf.header import is_gguf
from workers.loading.gguf.tokenizer_values import tokenizer_values
from workers.loading.weight_digest import weight_digest
from workers.models.causal_lm import CausalLM
from workers.ops.rope_config import RopeConfig
from workers.ops.rope_frequencies import attention_factor, inverse_frequencies

KV_VERSION = "1"
"""Of what this code writes into a cache for the same model; to be raised whenever that changes."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


def kv_identity(model: CausalLM, folder: Path) -> KVIdentity:
    """What a rank's cache means. Before `process_weights`, which brings parameters into a form of the device's own.

    Args:
        model: the rank's, loaded.
        folder: of its checkpoint, or its GGUF file.
    """
    scales = [repr(scales).encode() for scales in model.kv_scales] if model.kv_cache_dtype is not None else []
    return KVIdentity(
        version=KV_VERSION,
        weights=weight_digest(model.named_numbers().items()),
        config=digest_of(repr(model.config).encode(), *_frequencies(model.rotated_kinds, model.max_model_len)),
        tokenizer=tokenizer_digest(folder),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_scales=digest_of(*scales) if scales else "",
    )


def tokenizer_digest(folder: Path) -> str:
    """The digest of what a checkpoint's files, or its GGUF file, say of a text's ids; empty where there are none."""
    if is_gguf(folder):
        return digest_of(*tokenizer_values(folder))
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return digest_of(*(part for file in found for part in (file.name.encode(), file.read_bytes()))) if found else ""


def _frequencies(kinds: Iterable[tuple[RopeConfig, int]], max_model_len: int) -> list[bytes]:
    """Those that depend on the context that is served are unlike for workers with unlike ones."""
    return [
        inverse_frequencies(rope, head_size, max_model_len).numpy().tobytes() + repr(attention_factor(rope)).encode()
        for rope, head_size in kinds
    ]
