"""Text from tokens as they come, never cutting a character and never taking anything back."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

_CONTEXT = 4
"""Tokens kept before new ones. A token is at least one byte, so these hold any UTF-8 character that is not finished,
and they keep what a decoder does at the start of a text (dropping a space) away from new tokens."""
_MAX_WINDOW = 4 * _CONTEXT
"""The window is cut back to its context when it gets longer than this."""


class TokenKind(enum.IntEnum):
    """What a token does to the text."""

    SILENT = 0
    """Nothing: a special token, or an id without a token."""
    TEXT = 1
    BYTE = 2
    """One byte (`<0x0A>`), of a vocabulary with byte fallback."""


class TextDecoder(Protocol):
    """What detokenising needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all these tokens, special ones left out."""
        ...

    def token_kind(self, token_id: int) -> TokenKind:
        """What this token does to the text."""
        ...


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text piece by piece.

    All pieces together, `finish()` included, are exactly `decode` of all tokens, also for invalid bytes. A piece is
    held back only as long as it may still change: a last character that is U+FFFD may be an unfinished one, and a
    run of byte-fallback tokens is decoded as a whole or, if any byte of it is wrong, as U+FFFD for every byte, so it
    waits for the token after it. The cost per token does not grow with the text: only a window of the last tokens
    is decoded, and what the window held before is skipped.

    `tokenizers.decoders.DecodeStream` does not do: it decodes invalid bytes over and over, has no end, and
    has already given away the good part of a byte run when a wrong byte spoils it.
    """

    def __init__(self, tokenizer: TextDecoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_sent = 0
        """Characters of the decoded window that were given away, or belong to its context."""
        self._byte_run: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; return the text that is certain now and was not returned before."""
        grown = False
        for token_id in token_ids:
            kind = self._tokenizer.token_kind(token_id)
            if kind is TokenKind.BYTE:
                self._byte_run.append(token_id)
            elif kind is TokenKind.TEXT:
                self._window += self._byte_run
                self._window.append(token_id)
                self._byte_run.clear()
                grown = True
        if not grown:
            return ""
        text = self._tokenizer.decode(self._window)
        end = _certain_length(text)
        piece = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        if len(self._window) > _MAX_WINDOW:
            self._cut_window()
        return piece

    def finish(self) -> str:
        """The rest of the text: nothing comes after it."""
        text = self._tokenizer.decode(self._window + self._byte_run)
        piece = text[self._num_sent :]
        self._window, self._byte_run, self._num_sent = [], [], 0
        return piece

    def _cut_window(self) -> None:
        context = self._window[-_CONTEXT:]
        text = self._tokenizer.decode(context)
        # A context without text (spaces that a decoder drops at the start) would not protect what follows it.
        if text:
            self._window = context
            self._num_sent = _certain_length(text)


def _certain_length(text: str) -> int:
    """How many characters can no longer change: all but a U+FFFD at the end, which may be an unfinished character.

    An unfinished character, at most three bytes, decodes to a single U+FFFD (Unicode 15, section 3.9, "U+FFFD
    Substitution of Maximal Subparts"), so those before the last one stand for bytes that are wrong for good.
    """
    return len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
