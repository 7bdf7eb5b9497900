"""What a GGUF file says of its tokenizer, to tell tokenizers apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from workers.loading.gguf.header import read_header

_ABOUT_TEXT = "tokenizer.ggml."


def tokenizer_values(file: Path) -> Iterator[bytes]:
    """Keys and values, by turns, that say which ids a text has; the chat template is none of them.

    Raises:
        CheckpointError: as `read_header`.
    """
    for key, value in sorted(read_header(file, string_lists=True).metadata.items()):
        if key.startswith(_ABOUT_TEXT):
            yield key.encode()
            yield repr(value).encode()
