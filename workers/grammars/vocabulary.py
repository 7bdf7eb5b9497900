"""A checkpoint's tokens as grammars need them: the bytes that each one stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from workers.errors import CheckpointError
from workers.loading.gguf.header import is_gguf


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens of a checkpoint; takes about a second for a large vocabulary.

    Args:
        folder: of the checkpoint, with its tokenizer.json, or its GGUF file.
        vocab_size: logits in a row; ids that no token has, and special tokens, are in no grammar.
        eos_token_ids: the tokens that end a text.

    Raises:
        CheckpointError: there is no tokenizer.json, or it is not understood.
    """
    try:
        text = _of_gguf(folder) if is_gguf(folder) else (folder / "tokenizer.json").read_text(encoding="utf-8")
        return vocabulary_of(text, vocab_size, eos_token_ids)
    except Exception as error:  # libraries raise what their parsers raise, of tokenizers that a model may have
        raise CheckpointError(f"{folder} gives no vocabulary for structured output: {error}") from error


def _of_gguf(file: Path) -> str:
    from transformers import AutoTokenizer  # takes seconds: only who has such a file waits for it

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    return str(tokenizer.backend_tokenizer.to_str())


def vocabulary_of(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The same, of a tokenizer as the `tokenizers` library writes it.

    Raises:
        ValueError: it is not understood, has an id beyond `vocab_size`, or none of the tokens that end a text.
    """
    known = set(Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True).values())
    ends = sorted(known.intersection(eos_token_ids))
    if not ends:
        raise ValueError(f"it has no token with an id in {sorted(eos_token_ids)}, which end a text")
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
