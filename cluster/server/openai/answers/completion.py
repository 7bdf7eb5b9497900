"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.prompt_positions import PromptPosition
from cluster.generation.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter, prompt_entries
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
        self._prompts = prompts
        self._returns_ids = bool(body.return_token_ids)
        self._echoes = echoes
        self._token_bytes = token_bytes
        self._shows_tokens = body.logprobs is not None or bool(body.return_token_ids)
        self._writers: list[LogprobWriter] | None = None
        if body.logprobs is not None:
            as_ids = bool(body.return_tokens_as_token_ids)
            count = len(prompts) * self._n
            self._writers = [LogprobWriter(token_bytes, body.logprobs, as_ids=as_ids) for _ in range(count)]
        self._begun: set[int] = set()
        self._num_prompt_top = body.prompt_logprobs
        self._positions: dict[int, Sequence[PromptPosition]] = {}

    def whole(self, choices: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        for index, chunk in enumerate(choices):
            self._take_prompt(index, chunk)
        written = [self._choice(index, chunk) for index, chunk in enumerate(choices)]
        return {**self._head, "choices": written, "usage": usage.completion()}

    def part(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of an answer is in events: none where it has nothing to show yet."""
        self._take_prompt(index, chunk)
        silent = not chunk.text and chunk.finish_reason is None and not self._shows_tokens
        opens = index not in self._begun and (bool(self._echoes) or self._num_prompt_top is not None)
        if silent and not opens:
            return []
        return [{**self._head, "choices": [self._choice(index, chunk)]}]

    def last(self, usage: UsageCount) -> dict[str, Any]:
        """The event with the usage."""
        return {**self._head, "choices": [], "usage": usage.completion()}

    def _take_prompt(self, index: int, chunk: TextChunk) -> None:
        """One of the answers to each prompt comes with its log-probabilities, before any of the others."""
        if chunk.prompt_logprobs is not None:
            self._positions[index // self._n] = chunk.prompt_logprobs

    def _choice(self, index: int, chunk: TextChunk) -> dict[str, Any]:
        first = index not in self._begun
        self._begun.add(index)
        number = index // self._n
        echo = self._echoes[number] if first and self._echoes else None
        choice: dict[str, Any] = {"index": index, "text": (echo or "") + chunk.text, "logprobs": None, **ending(chunk)}
        if self._writers is not None:
            writer, own = self._writers[index], {}
            if echo is not None:
                own = writer.echoed(self._prompts[number], self._positions[number], echo)
            choice["logprobs"] = {name: own.get(name, []) + new for name, new in writer.lists(chunk.tokens).items()}
        if self._num_prompt_top is not None and first:
            positions = self._positions[number]
            choice["prompt_logprobs"] = prompt_entries(positions, self._num_prompt_top, self._token_bytes)
        if self._returns_ids:
            choice["token_ids"] = token_ids_of(chunk)
            choice["prompt_token_ids"] = self._prompts[number] if first else None
        return choice
