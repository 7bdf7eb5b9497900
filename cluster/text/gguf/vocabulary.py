"""What a GGUF file says of its tokenizer (`tokenizer.ggml.*`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError
from workers.loading.config_reader import ConfigReader
from workers.loading.gguf.end_tokens import end_token_ids
from workers.loading.gguf.header import read_header

_PREFIX = "tokenizer.ggml."


class TokenType(enum.IntEnum):
    """Of a token, as llama.cpp numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer without its rules.

    Attributes:
        file: where it is from, for errors.
        architecture: the model's.
        kind: "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE).
        split: how a text is split into words (`tokenizer.ggml.pre`); None: nothing is said.
        tokens: by id.
        types: of each.
        scores: of each: pieces with a higher one are merged first; empty: there are none.
        merges: pairs of pieces, the first merged first; empty: there are none.
        special: ids of "bos", "eos", "unknown" and "padding", as far as they are said.
        end_token_ids: what ends a text.
        flags: `add_bos_token`, `add_eos_token` and `add_space_prefix`, as far as they are said.
        chat_template: None: there is none.
    """

    file: Path
    architecture: str
    kind: str
    split: str | None
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, int]
    end_token_ids: Sequence[int]
    flags: Mapping[str, bool]
    chat_template: str | None

    def of_type(self, kind: TokenType) -> list[str]:
        """The tokens of a type, in order of their ids."""
        return [token for token, own in zip(self.tokens, self.types, strict=True) if own == kind]

    def error(self, key: str, problem: str) -> CheckpointError:
        """One that names the file and a key of the tokenizer."""
        return CheckpointError(f"{self.file}: {_PREFIX}{key}: {problem}")


def read_vocabulary(file: Path) -> Vocabulary:
    """Read it.

    Raises:
        CheckpointError: the file is none, or a key is missing or wrong; names file and key.
    """
    header = read_header(file, string_lists=True)
    read = ConfigReader(header.metadata, str(file), _PREFIX)
    of = {key.removeprefix(_PREFIX): value for key, value in header.metadata.items() if key.startswith(_PREFIX)}
    inner = ConfigReader(of, str(file), _PREFIX)
    tokens = _list(inner, "tokens", str)
    if not tokens:
        raise inner.error("tokens", "is missing")
    template = header.metadata.get("tokenizer.chat_template")
    return Vocabulary(
        file=file,
        architecture=str(read.get("general.architecture")),
        kind=str(inner.get("model")),
        split=inner.get("pre"),
        tokens=tokens,
        types=_list(inner, "token_type", int, len(tokens)) or [TokenType.NORMAL] * len(tokens),
        scores=_list(inner, "scores", float, len(tokens)),
        merges=[_pair(inner, merge) for merge in _list(inner, "merges", str)],
        special=_special(inner, len(tokens)),
        end_token_ids=end_token_ids(header),
        flags={
            name: inner.flag(name)
            for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
            if inner.get(name) is not None
        },
        chat_template=template if isinstance(template, str) else None,
    )


def _list(read: ConfigReader, key: str, kind: type, length: int | None = None) -> list[Any]:
    values = read.get(key) or []
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise read.error(key, f"must be a list of {kind.__name__}")
    if values and length is not None and len(values) != length:
        raise read.error(key, f"has {len(values)} entries for {length} tokens")
    return values


def _pair(read: ConfigReader, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise read.error("merges", f"{merge!r} is no pair of pieces")
    return left, right


def _special(read: ConfigReader, num_tokens: int) -> dict[str, int]:
    found = {}
    for name in ("bos", "eos", "unknown", "padding"):
        token_id = read.optional_int(f"{name}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < num_tokens:
            raise read.error(f"{name}_token_id", f"{token_id} is none of the {num_tokens} tokens")
        found[name] = token_id
    return found
