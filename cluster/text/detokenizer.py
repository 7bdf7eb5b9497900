"""Text from tokens as they come, never cutting a character and never taking anything back."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from workers.token_ids import TokenIds

REPLACEMENT = "\ufffd"

_CONTEXT = 4
"""Tokens (or characters in bytes) kept before new ones. A token is at least one byte, so these hold any UTF-8
character that is not finished, and they keep what a decoder does at the start of a text (dropping a space) away."""
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

    @property
    def anchor(self) -> Sequence[int]:
        """Tokens with a text of their own, after which others are decoded as they continue a text; may be none."""
        ...

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that begins with these tokens and has no others, special ones left out."""
        ...

    def token_kind(self, token_id: int) -> TokenKind:
        """What this token does to the text."""
        ...

    def byte_value(self, token_id: int) -> int:
        """The byte that a token of kind BYTE stands for."""
        ...

    def whole_text(self, token_id: int) -> str | None:
        """What a TEXT token adds to any text that ends with a whole character; None: that depends on the text."""
        ...


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text piece by piece.

    All pieces together, `finish()` included, are the text of all tokens as they follow the context, also for invalid
    bytes. A piece is held back only as long as it may still change: a last character that is U+FFFD may be an
    unfinished one, and byte-fallback tokens wait until their character is complete, or one byte is known to be wrong.
    The cost per token does not grow with the text: only a window of the last tokens is decoded, and what the window
    held before is skipped.

    In one case the library's `decode` of all tokens says something else: it turns a whole run of byte-fallback tokens
    into U+FFFD where one byte is wrong, characters that were shown before included. Here they stay.

    `tokenizers.decoders.DecodeStream` does not do: it decodes invalid bytes over and over, and has no end.

    Args:
        tokenizer: whose tokens they are.
        context: tokens before them, whose text is not given again; of a long prompt the end is looked at. Empty: a text
            begins here, and what a decoder does there (dropping a space) is done.
    """

    def __init__(self, tokenizer: TextDecoder, context: Sequence[int] | TokenIds = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[tuple[int, ...]] = []
        """Tokens, those of a character in bytes together."""
        self._grown = False
        """Whether there are tokens in it whose text was not looked at."""
        self._num_sent = 0
        """Characters of the decoded window that were given away, or belong to its context."""
        self._pending: list[int] = []
        """Bytes of a character that is not complete."""
        self._whole = False
        """Whether the window's text ends with a whole character, and all of it was given away."""
        self.push(_visible_end(tokenizer, context))

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; return the text that is certain now and was not returned before."""
        if self._whole and len(token_ids) == 1 and (text := self._tokenizer.whole_text(token_ids[0])) is not None:
            self._window.append((token_ids[0],))
            self._num_sent += len(text)
            if len(self._window) > _MAX_WINDOW:
                self._cut_window()
            return text
        pieces = []
        for token_id in token_ids:
            kind = self._tokenizer.token_kind(token_id)
            if kind is TokenKind.BYTE:
                self._whole = False
                self._pending.append(token_id)
                pieces.append(self._settle_bytes())
            elif kind is TokenKind.TEXT:
                pieces.append(self._drop_bytes(len(self._pending)))
                self._grow((token_id,))
        if self._grown:
            pieces.append(self._advance())
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, which no token after it changes; if one comes all the same, it continues the text."""
        piece = self._advance(at_end=True) + REPLACEMENT * len(self._pending)
        self._pending.clear()
        self._begin_anew()
        return piece

    def _settle_bytes(self) -> str:
        """Move a character that is complete into the window; the text of what bytes that are wrong end."""
        pieces = []
        while self._pending:
            try:
                bytes(map(self._tokenizer.byte_value, self._pending)).decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                pieces.append(self._drop_bytes(error.end))
            else:
                self._grow(tuple(self._pending))
                self._pending.clear()
        return "".join(pieces)

    def _drop_bytes(self, count: int) -> str:
        """The text up to and with the first pending bytes, which are wrong: nothing after them looks back at it."""
        if not count:
            return ""
        piece = self._advance(at_end=True)
        del self._pending[:count]
        self._begin_anew()
        return piece + REPLACEMENT * count

    def _begin_anew(self) -> None:
        """Forget the tokens so far, but not that there were some."""
        self._whole = False
        anchor = self._tokenizer.anchor
        self._window = [tuple(anchor)] if anchor else []
        self._num_sent = len(self._tokenizer.text_of(anchor))

    def _grow(self, tokens: tuple[int, ...]) -> None:
        self._window.append(tokens)
        self._grown = True

    def _advance(self, at_end: bool = False) -> str:
        """The text of the window that is certain and was not returned before."""
        self._grown = False
        text = self._text_of(self._window)
        end = len(text) if at_end else _certain_length(text)
        piece = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        self._whole = bool(text) and self._num_sent == len(text) and not text.endswith(REPLACEMENT)
        if len(self._window) > _MAX_WINDOW:
            self._cut_window()
        return piece

    def _cut_window(self) -> None:
        context = self._window[-_CONTEXT:]
        text = self._text_of(context)
        # A context without text (spaces that a decoder drops at the start) would not protect what follows it.
        if text:
            self._window = context
            self._num_sent = _certain_length(text)

    def _text_of(self, window: Sequence[tuple[int, ...]]) -> str:
        return self._tokenizer.text_of([token_id for tokens in window for token_id in tokens])


def _visible_end(tokenizer: TextDecoder, token_ids: Sequence[int] | TokenIds) -> list[int]:
    """The last tokens that do something to the text, as many as a window has."""
    found: list[int] = []
    for token_id in reversed(token_ids):
        if tokenizer.token_kind(int(token_id)) is not TokenKind.SILENT:
            found.append(int(token_id))
            if len(found) > _MAX_WINDOW:
                break
    return found[::-1]


def _certain_length(text: str) -> int:
    """How many characters can no longer change: all but a U+FFFD at the end, which may be an unfinished character.

    An unfinished character, at most three bytes, decodes to a single U+FFFD (Unicode 15, section 3.9, "U+FFFD
    Substitution of Maximal Subparts"), so those before the last one stand for bytes that are wrong for good.
    """
    return len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
