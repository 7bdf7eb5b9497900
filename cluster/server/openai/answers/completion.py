"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.gateway.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter
from cluster.server.openai.answers.parts import Head, ending, token_ids_of
from cluster.server.openai.answers.usage import UsageCount
from cluster.server.openai.requests.completion import CompletionRequest

_KIND = "text_completion"


class CompletionWriter:
    """Writes one request's answer, whole or in events.

    Args:
        head: of the answer.
        body: what was asked.
        prompts: token ids of each.
        echoes: text of each prompt, which its answers begin with; none without `echo`.
        token_bytes: the bytes that a token stands for.
    """

    def __init__(
        self,
        head: Head,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._head = head.of(_KIND)
        self._n = body.n or 1
        self._prompts = prompts if body.return_token_ids else None
        self._echoes = echoes
        self._shows_tokens = body.logprobs is not None or bool(body.return_token_ids)
        self._writers: list[LogprobWriter] | None = None
        if body.logprobs is not None:
            as_ids = bool(body.return_tokens_as_token_ids)
            count = len(prompts) * self._n
            self._writers = [LogprobWriter(token_bytes, body.logprobs, as_ids=as_ids) for _ in range(count)]
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        written = [self._choice(index, chunk) for index, chunk in enumerate(choices)]
        return {**self._head, "choices": written, "usage": usage.completion()}

    def part(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of an answer is in events: none where it has nothing to show yet."""
        silent = not chunk.text and chunk.finish_reason is None and not self._shows_tokens
        if silent and not (self._echoes and index not in self._begun):
            return []
        return [{**self._head, "choices": [self._choice(index, chunk)]}]

    def last(self, usage: UsageCount) -> dict[str, Any]:
        """The event with the usage."""
        return {**self._head, "choices": [], "usage": usage.completion()}

    def _choice(self, index: int, chunk: TextChunk) -> dict[str, Any]:
        first = index not in self._begun
        self._begun.add(index)
        text = chunk.text
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, **ending(chunk)}
        if first and self._echoes:
            echo = self._echoes[index // self._n]
            choice["text"] = echo + text
            if self._writers is not None:
                self._writers[index].skip(echo)
        if self._writers is not None:
            choice["logprobs"] = self._writers[index].lists(chunk.tokens)
        if self._prompts is not None:
            choice["token_ids"] = token_ids_of(chunk)
            choice["prompt_token_ids"] = self._prompts[index // self._n] if first else None
        return choice
