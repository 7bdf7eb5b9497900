"""How much text can a context window hold at most? An answer that needs no tokenising.

If every token stands for at most b bytes of the text, a text of more than b × n bytes has more than n tokens. That
holds only for tokenizers that lose nothing: where a normaliser may delete characters, or any run of unknown ones
becomes a single token, no bound exists and none is claimed.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

_BYTE_LEVEL = "ByteLevel"
_LOSSLESS_PRE_TOKENIZERS = {_BYTE_LEVEL, "Digits", "Metaspace", "UnicodeScripts", "FixedLength"}
_WHITESPACE_PRE_TOKENIZERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_SPLITTERS = {"Split", "Punctuation"}
_MAX_UTF8_BYTES = 4


@dataclass(frozen=True)
class LengthBound:
    """A sound upper bound on the text that a number of tokens can stand for.

    Attributes:
        bytes_per_token: the most UTF-8 bytes that one token stands for, counted after the steps below.
        composes: whether the tokenizer normalises to NFC, which may shorten the text.
        drops_whitespace: whether whitespace may disappear, so that it must not be counted.
    """

    bytes_per_token: int
    composes: bool = False
    drops_whitespace: bool = False

    def exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether `text`, valid Unicode, is certainly more than `num_tokens` tokens; False says nothing."""
        limit = self.bytes_per_token * num_tokens
        if len(text.encode()) <= limit:
            return False
        if self.composes:
            text = unicodedata.normalize("NFC", text)
        if self.drops_whitespace:
            text = "".join(text.split())
        return len(text.encode()) > limit


def length_bound(tokenizer: tokenizers.Tokenizer) -> LengthBound | None:
    """The bound that holds for this tokenizer, or None if there is none."""
    composes, drops_whitespace, byte_level = False, False, False
    for step in _steps(tokenizer.normalizer, "normalizers"):
        kind = step["type"]
        if kind == "NFC":
            composes = True
        elif kind == "Strip":
            drops_whitespace = True
        elif kind == _BYTE_LEVEL:
            byte_level = True
        elif kind != "Prepend" and not _grows(step):
            return None
    for step in _steps(tokenizer.pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind in _WHITESPACE_PRE_TOKENIZERS:
            drops_whitespace = True
        elif kind not in _LOSSLESS_PRE_TOKENIZERS and not (kind in _SPLITTERS and step["behavior"] != "Removed"):
            return None
        byte_level = byte_level or kind == _BYTE_LEVEL
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        drops_whitespace = True

    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if not _keeps_everything(tokenizer.model, vocab, byte_level):
        return None
    # In a byte-level vocabulary a character stands for a byte; in others a string is at least as long as its text.
    longest = max((len(token) if byte_level else len(token.encode()) for token in vocab), default=0)
    contents = [form for token in added for form in (token.content, unicodedata.normalize("NFC", token.content))]
    longest_added = max((len(content.encode()) for content in contents), default=0)
    return LengthBound(max(longest, longest_added, _MAX_UTF8_BYTES), composes, drops_whitespace)


def _steps(component: Any, children: str) -> Iterator[dict[str, Any]]:
    """A component's serialised steps, sequences unrolled."""
    if component is None:
        return
    stack = [json.loads(component.__getstate__())]
    while stack:
        step = stack.pop()
        if step["type"] == "Sequence":
            stack.extend(reversed(step[children]))
        else:
            yield step


def _grows(step: dict[str, Any]) -> bool:
    """Whether a normaliser replaces a fixed string by one that is not shorter."""
    if step["type"] != "Replace" or "String" not in step["pattern"]:
        return False
    return len(step["content"].encode()) >= len(step["pattern"]["String"].encode())


def _keeps_everything(model: Any, vocab: dict[str, int], byte_level: bool) -> bool:
    """Whether every character of the text costs at least its share of a token."""
    if not isinstance(model, models.BPE):
        return False
    if byte_level and all(symbol in vocab for symbol in pre_tokenizers.ByteLevel.alphabet()):
        return True
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return True
    # One unknown token per character; fused ones could stand for any number, and without one they vanish.
    return model.unk_token in vocab and not model.fuse_unk
