"""The bytes that a token stands for, wherever it stands in a text."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class TokenBytes:
    """By token id, the bytes of its text: a space that a decoder drops at the start of a text is there.

    A byte-level vocabulary spells each byte with one character, one with byte fallback has a token `<0x0A>` for each
    byte, SentencePiece writes a space as "▁", and WordPiece marks what goes on with a word. Added tokens stand for what
    they are spelled with.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = list(_decoder_steps(tokenizer.decoder))
        kinds = {step["type"] for step in steps}
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._spaced = "Metaspace" in kinds or any(
            step["type"] == "Replace" and step.get("pattern", {}).get("String") == _SPACE for step in steps
        )
        self._continued = next((str(step["prefix"]) for step in steps if step["type"] == "WordPiece"), None)
        self._added = {
            token_id: token.content.encode() for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._only_bytes = kinds == {"ByteLevel"}
        self._cached = functools.lru_cache(maxsize=65_536)(self._bytes)

    def __call__(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        return self._cached(token_id)

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token that adds the same to every text which ends with whole characters; None: it may not.

        A byte-level decoder puts the tokens' bytes one after the other and then makes characters of them: so a token
        whose bytes are whole characters is one of these.
        """
        if not self._only_bytes or token_id in self._added:
            return None
        try:
            return self(token_id).decode() or None
        except UnicodeDecodeError:
            return None

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None and all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._continued is not None:
            begins = not token.startswith(self._continued)
            token = " " + token if begins else token[len(self._continued) :]
        return (token.replace(_SPACE, " ") if self._spaced else token).encode()


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    step = json.loads(decoder.__getstate__())
    return step["decoders"] if step["type"] == "Sequence" else [step]


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte in byte-level vocabularies: itself where it is printable, else one from 256 on.

    The mapping is that of GPT-2 (Radford et al., 2019, `bytes_to_unicode`).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
