"""What an answer of /v1/responses consists of, messages and calls in order, and the events that each comes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.conversation.deltas import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallStarted
from cluster.generation.text_chunk import TextChunk
from cluster.server.openai.answers.logprobs import LogprobWriter

_Event = dict[str, Any]


class ResponseItems:
    """Takes parts of an answer; a stream shows the events, and a whole answer the items.

    An item is opened by its first text, and closed by the beginning of the next one or the answer's end.

    Attributes:
        items: those that there are, the last one perhaps open.

    Args:
        name: that the ids of the items end in.
        event: makes an event of a type and fields.
        logprobs: writes the log-probabilities of text; None: they are not wanted.
    """

    def __init__(self, name: str, event: Callable[..., _Event], logprobs: LogprobWriter | None) -> None:
        self.items: list[dict[str, Any]] = []
        self._name, self._event, self._logprobs = name, event, logprobs
        self._open = False

    def add(self, chunk: TextChunk) -> list[_Event]:
        """A part of the answer, as events: none where it has nothing to show yet."""
        deltas: tuple[Delta, ...] = (ContentDelta(chunk.text),) if chunk.deltas is None else chunk.deltas
        logprobs = [] if self._logprobs is None else self._logprobs.content(chunk.tokens)
        events: list[_Event] = []
        for delta in deltas:
            match delta:
                case ContentDelta(text) if text:
                    events += self._text(text, logprobs)
                    logprobs = []
                case ToolCallStarted(index, call_id, name):
                    events += self._call(index, call_id, name)
                    logprobs = []
                case ArgumentsDelta(_, text):
                    events += self._arguments(text)
                    logprobs = []
                case ReasoningDelta():
                    pass
        if logprobs and not self._in_a_call:
            events += self._text("", logprobs)
        return events

    def end(self, *, cut: bool) -> list[_Event]:
        """The answer has ended; `cut`: because of its length."""
        events = [] if self.items else self._begin_message()
        return events + self._close("incomplete" if cut else "completed")

    @property
    def _in_a_call(self) -> bool:
        return bool(self.items) and self.items[-1]["type"] == "function_call"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[_Event]:
        events = []
        if not self._open or self._in_a_call:
            events = self._close() + self._begin_message()
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        shown = {"content_index": 0, "delta": text, "logprobs": logprobs}
        return [*events, self._event("response.output_text.delta", **self._place, **shown)]

    def _begin_message(self) -> list[_Event]:
        item = {"type": "message", "id": self._id("msg"), "status": "in_progress", "role": "assistant"}
        self._begin({**item, "content": []})
        events = [self._added()]
        self.items[-1]["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [*events, self._event("response.content_part.added", **self._place, content_index=0, part=part)]

    def _call(self, index: int, call_id: str, name: str) -> list[_Event]:
        events = self._close()
        item = {"type": "function_call", "id": self._id("fc"), "call_id": call_id, "name": name, "arguments": ""}
        self._begin({**item, "status": "in_progress"})
        return [*events, self._added()]

    def _arguments(self, text: str) -> list[_Event]:
        self.items[-1]["arguments"] += text
        return [self._event("response.function_call_arguments.delta", **self._place, delta=text)]

    def _begin(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self._open = True

    def _added(self) -> _Event:
        return self._event("response.output_item.added", output_index=len(self.items) - 1, item=dict(self.items[-1]))

    def _close(self, status: str = "completed") -> list[_Event]:
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if self._in_a_call:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **self._place, **done)]
        else:
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **self._place, content_index=0, **done),
                self._event("response.content_part.done", **self._place, content_index=0, part=part),
            ]
        return [*events, self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)]

    def _id(self, kind: str) -> str:
        number = len(self.items)
        return f"{kind}_{self._name}" + (f"_{number}" if number else "")
