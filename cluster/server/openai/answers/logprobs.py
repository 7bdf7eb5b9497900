"""Log-probabilities, in the two forms that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workers.messages import TokenOutput

_LOWEST = -9999.0
"""JSON has no infinity; this is what OpenAI's own answers have in its place."""


class LogprobWriter:
    """Writes the log-probabilities of one answer.

    Args:
        token_bytes: the bytes that a token stands for.
        num_top: of the most likely tokens, so many are wanted.
        as_ids: a token is shown as `token_id:42`, which is unambiguous, and not as its text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], num_top: int, *, as_ids: bool = False) -> None:
        self._token_bytes = token_bytes
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = 0

    def content(self, tokens: Sequence[TokenOutput]) -> list[dict[str, Any]]:
        """For chats: one entry a token, with its bytes and its alternatives."""
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(top.token_id, top.logprob) for top in token.top_logprobs[: self._num_top]],
            }
            for token in tokens
        ]

    def lists(self, tokens: Sequence[TokenOutput]) -> dict[str, Any]:
        """For completions: lists with one element a token. Offsets count characters from the answer's beginning."""
        texts = [self._text(token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "tokens": texts,
            "top_logprobs": [self._alternatives(token) for token in tokens],
        }

    def skip(self, text: str) -> None:
        """Count text that stands before the answer's first token."""
        self._offset += len(text)

    def _alternatives(self, token: TokenOutput) -> dict[str, float | None] | None:
        """The most likely tokens and the chosen one, by their text; of those with one text the likeliest."""
        alternatives: dict[str, float | None] = {}
        for top in token.top_logprobs[: self._num_top]:
            alternatives.setdefault(self._text(top.token_id), _finite(top.logprob))
        alternatives.setdefault(self._text(token.token_id), _finite(token.logprob))
        return alternatives

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._token_bytes(token_id).decode("utf-8", "replace")


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
