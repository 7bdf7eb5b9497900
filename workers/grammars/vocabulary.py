"""A checkpoint's tokens as grammars need them: the bytes that each one stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from workers.errors import CheckpointError


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens of a checkpoint; takes about a second for a large vocabulary.

    Args:
        folder: of the checkpoint, with its tokenizer.json.
        vocab_size: logits in a row; ids that no token has, and special tokens, are in no grammar.
        eos_token_ids: the tokens that end a text.

    Raises:
        CheckpointError: there is no tokenizer.json, or it is not understood.
    """
    path = folder / "tokenizer.json"
    try:
        return vocabulary_of(path.read_text(encoding="utf-8"), vocab_size, eos_token_ids)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} gives no vocabulary for structured output: {error}") from error


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
