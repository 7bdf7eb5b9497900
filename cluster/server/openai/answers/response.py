"""Answers of /v1/responses, whole or as the events that they come into being by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter
from cluster.server.openai.answers.parts import Head
from cluster.server.openai.answers.response_items import ResponseItems
from cluster.server.openai.answers.usage import UsageCount
from cluster.server.openai.requests.response import ResponseRequest
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams


class ResponseWriter:
    """Writes one request's answer.

    Args:
        head: of the answer.
        body: what was asked.
        sampling: with which tokens are chosen.
        token_bytes: the bytes that a token stands for.
    """

    def __init__(
        self, head: Head, body: ResponseRequest, sampling: SamplingParams, token_bytes: Callable[[int], bytes]
    ) -> None:
        self._head, self._body, self._sampling = head, body, sampling
        top = body.num_logprobs
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = None if top is None else LogprobWriter(token_bytes, top, as_ids=as_ids)
        self._number = 0
        self._items = ResponseItems(head.id.removeprefix("resp_"), self._event, logprobs)
        self._cut = False

    def whole(self, chunks: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        for chunk in chunks:
            self.part(chunk)
        answer: dict[str, Any] = self.closing(usage)[-1]["response"]
        return answer

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first part."""
        response = self._response("in_progress", [], None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def part(self, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of the answer is in events: none where it has nothing to show yet."""
        self._cut = chunk.finish_reason is FinishReason.LENGTH
        return self._items.add(chunk)

    def closing(self, usage: UsageCount) -> list[dict[str, Any]]:
        """The events behind the last part; the last one has the whole answer."""
        events = self._items.end(cut=self._cut)
        status = "incomplete" if self._cut else "completed"
        response = self._response(status, self._items.items, usage)
        return [*events, self._event(f"response.{status}", response=response)]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event for what went wrong when something had been sent already."""
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _response(self, status: str, output: list[dict[str, Any]], usage: UsageCount | None) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "model": self._head.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": self._body.metadata or {},
            "output": output,
            "parallel_tool_calls": bool(self._body.tools) and self._body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._sampling.temperature,
            "text": self._body.text or {"format": {"type": "text"}},
            "tool_choice": self._body.tool_choice or ("auto" if self._body.tools else "none"),
            "tools": self._body.tools or [],
            "top_p": self._sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else usage.response(),
            "user": self._body.user,
        }
