"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter, prompt_entries
from cluster.server.openai.answers.message import MessageWriter
from cluster.server.openai.answers.parts import Head, ending, token_ids_of
from cluster.server.openai.answers.usage import UsageCount
from cluster.server.openai.requests.chat import ChatCompletionRequest

_WHOLE, _PART = "chat.completion", "chat.completion.chunk"


class ChatWriter:
    """Writes one request's answer, whole or in events.

    Args:
        head: of the answer.
        body: what was asked.
        prompt: its token ids.
        token_bytes: the bytes that a token stands for.
    """

    def __init__(
        self, head: Head, body: ChatCompletionRequest, prompt: list[int], token_bytes: Callable[[int], bytes]
    ) -> None:
        self._whole_head, self._head = head.of(_WHOLE), head.of(_PART)
        self._token_bytes = token_bytes
        self._num_prompt_top = body.prompt_logprobs
        self._token_ids = bool(body.return_token_ids)
        self._prompt = prompt if self._token_ids else None
        top = body.num_logprobs
        as_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = None if top is None else LogprobWriter(token_bytes, top, as_ids=as_ids)
        self._begun: set[int] = set()
        self._message = MessageWriter(reasoning=body.include_reasoning is not False)

    def whole(self, choices: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        written = []
        for index, chunk in enumerate(choices):
            written.append({**self._choice(index, chunk), "message": self._message.whole(chunk)})
        answer = {**self._whole_head, **self._shown_prompt(), "choices": written, "usage": usage.completion()}
        for chunk in choices:
            answer |= self._prompt_logprobs(chunk)
        return answer

    def part(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of an answer is in events: none where it has nothing to show yet; the first says who speaks."""
        events = []
        if index not in self._begun:
            self._begun.add(index)
            opening = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
            events.append({**self._head, **self._shown_prompt(), "choices": [choice], **self._prompt_logprobs(chunk)})
        delta = self._message.part(chunk)
        if delta or chunk.finish_reason is not None or self._logprobs is not None or self._token_ids:
            events.append({**self._head, "choices": [{**self._choice(index, chunk), "delta": delta}]})
        return events

    def last(self, usage: UsageCount) -> dict[str, Any]:
        """The event with the usage."""
        return {**self._head, "choices": [], "usage": usage.completion()}

    def _choice(self, index: int, chunk: TextChunk) -> dict[str, Any]:
        """What a message and a part of one have in common."""
        logprobs = None if self._logprobs is None else {"content": self._logprobs.content(chunk.tokens)}
        choice = {"index": index, "logprobs": logprobs, **ending(chunk)}
        if self._token_ids:
            choice["token_ids"] = token_ids_of(chunk)
        return choice

    def _prompt_logprobs(self, chunk: TextChunk) -> dict[str, Any]:
        """Those of the prompt, if they are wanted and came with this part: the first of all parts."""
        positions = chunk.prompt_logprobs
        if self._num_prompt_top is None or positions is None:
            return {}
        return {"prompt_logprobs": prompt_entries(positions, self._num_prompt_top, self._token_bytes)}

    def _shown_prompt(self) -> dict[str, Any]:
        return {} if self._prompt is None else {"prompt_token_ids": self._prompt}
