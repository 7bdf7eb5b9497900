"""Answers of /v1/responses: one message of text, whole or as the events that it comes into being by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter
from cluster.server.openai.answers.parts import Head, joined
from cluster.server.openai.answers.usage import UsageCount
from cluster.server.openai.requests.response import ResponseRequest
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

_AT = {"output_index": 0, "content_index": 0}


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
        self._item_id = head.id.replace("resp_", "msg_", 1)
        top = body.num_logprobs
        as_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = None if top is None else LogprobWriter(token_bytes, top, as_ids=as_ids)
        self._number = 0

    def whole(self, chunks: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        chunk = joined(chunks)
        cut = chunk.finish_reason is FinishReason.LENGTH
        item = self._item([self._content(chunk)], "incomplete" if cut else "completed")
        return self._response("incomplete" if cut else "completed", [item], usage)

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first text."""
        response = self._response("in_progress", [], None)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=self._item([], "in_progress")),
            self._event("response.content_part.added", item_id=self._item_id, part=part, **_AT),
        ]

    def part(self, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of the text is in events: none where it has nothing to show yet."""
        if not chunk.text and self._logprobs is None:
            return []
        logprobs = self._of_tokens(chunk)
        return [
            self._event("response.output_text.delta", item_id=self._item_id, delta=chunk.text, logprobs=logprobs, **_AT)
        ]

    def closing(self, chunks: Sequence[TextChunk], usage: UsageCount) -> list[dict[str, Any]]:
        """The events behind the last text, with all of it."""
        response = self.whole(chunks, usage)
        item = response["output"][0]
        content = item["content"][0]
        done = {"text": content["text"], "logprobs": content["logprobs"]}
        return [
            self._event("response.output_text.done", item_id=self._item_id, **done, **_AT),
            self._event("response.content_part.done", item_id=self._item_id, part=content, **_AT),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event for what went wrong when something had been sent already."""
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _of_tokens(self, chunk: TextChunk) -> list[dict[str, Any]]:
        return [] if self._logprobs is None else self._logprobs.content(chunk.tokens)

    def _content(self, chunk: TextChunk) -> dict[str, Any]:
        return {"type": "output_text", "text": chunk.text, "annotations": [], "logprobs": self._of_tokens(chunk)}

    def _item(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

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
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._sampling.temperature,
            "text": self._body.text or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self._sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else usage.response(),
            "user": self._body.user,
        }
