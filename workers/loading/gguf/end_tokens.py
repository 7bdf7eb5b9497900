"""Which tokens end a text, by a GGUF file."""

from __future__ import annotations

from workers.loading.config_reader import ConfigReader
from workers.loading.gguf.header import GgufHeader

CONTROL = 3
"""The type of a token that has no text of its own (`tokenizer.ggml.token_type`)."""

_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ENDS = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
"""Control tokens that end a text or a turn wherever they are; files name one of them, as llama.cpp knows the others."""


def end_token_ids(header: GgufHeader) -> list[int]:
    """Their ids, the one that the file names first.

    Args:
        header: with lists of strings.

    Raises:
        CheckpointError: an id that is none of the vocabulary; names file and key.
    """
    read = ConfigReader(header.metadata, str(header.file))
    tokens, kinds = read.get("tokenizer.ggml.tokens") or [], read.get("tokenizer.ggml.token_type") or []
    found: list[int] = []
    for key in (f"tokenizer.ggml.{name}" for name in _KEYS):
        token_id = read.optional_int(key)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise read.error(key, f"{token_id} is none of the vocabulary's {len(tokens)} tokens")
        found.append(token_id)
    of_each = enumerate(zip(tokens, kinds, strict=False))
    found += [token_id for token_id, (token, kind) in of_each if kind == CONTROL and token in _ENDS]
    return list(dict.fromkeys(found))
