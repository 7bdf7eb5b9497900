"""Log-probabilities, in the two forms that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.prompt_positions import PromptPosition, ScoredToken
from workers.messages import TokenLogprob, TokenOutput

_Scored = TokenOutput | TokenLogprob | ScoredToken
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

    def echoed(self, prompt: Sequence[int], positions: Sequence[PromptPosition], text: str) -> dict[str, Any]:
        """For completions that begin with their prompt: as `lists`, of the prompt, whose first token has none.

        Args:
            prompt: its token ids.
            positions: of those from the second on.
            text: of the prompt. Offsets are counted from its end, as the first tokens may be special ones without text.
        """
        offsets = [len(text)]
        for position in reversed(positions):
            offsets.append(max(0, offsets[-1] - len(position.chosen.text)))
        self._offset = len(text)
        return {
            "text_offset": [0, *reversed(offsets[1:])],
            "token_logprobs": [None, *(_finite(position.chosen.logprob) for position in positions)],
            "tokens": [self._text(token_id) for token_id in prompt],
            "top_logprobs": [None, *(self._by_text(position.chosen, position.top) for position in positions)],
        }

    def _alternatives(self, token: TokenOutput) -> dict[str, float | None]:
        return self._by_text(token, token.top_logprobs)

    def _by_text(self, chosen: _Scored, most_likely: Sequence[_Scored]) -> dict[str, float | None]:
        """The most likely tokens and the chosen one, by their text; of those with one text the likeliest."""
        alternatives: dict[str, float | None] = {}
        for top in most_likely[: self._num_top]:
            alternatives.setdefault(self._text(top.token_id), _finite(top.logprob))
        alternatives.setdefault(self._text(chosen.token_id), _finite(chosen.logprob))
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


def prompt_entries(
    positions: Sequence[PromptPosition], num_top: int, token_bytes: Callable[[int], bytes]
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has them: for each token of the prompt its own entry and the most likely ones, by id.

    The first is null. An entry has its rank, 1 for the most likely token; null where it is beyond `num_top`.
    """
    return [None, *(_entries_by_id(position, num_top, token_bytes) for position in positions)]


def _entries_by_id(position: PromptPosition, num_top: int, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    ranked = [(token, rank) for rank, token in enumerate(position.top[:num_top], start=1)]
    own = position.chosen
    rank = next((rank for token, rank in ranked if token.token_id == own.token_id), None)
    return {
        str(token.token_id): {
            "logprob": _finite(token.logprob),
            "rank": rank,
            "decoded_token": token_bytes(token.token_id).decode("utf-8", "replace"),
        }
        for token, rank in [(own, rank), *ranked]
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
