"""The message of a chat's answer: content, reasoning and tool calls, whole and in parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.conversation.deltas import (
    ArgumentsDelta,
    ContentDelta,
    Delta,
    MessageBuilder,
    ReasoningDelta,
    ToolCallStarted,
)
from cluster.generation.text_chunk import TextChunk


class MessageWriter:
    """Writes messages and parts of them as OpenAI has them, with `reasoning_content` as vLLM and DeepSeek have it.

    Args:
        reasoning: whether it is shown.
    """

    def __init__(self, *, reasoning: bool = True) -> None:
        self._reasoning = reasoning

    def whole(self, chunk: TextChunk) -> dict[str, Any]:
        """The message of a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": chunk.text, "refusal": None}
        if chunk.deltas is None:
            return message
        builder = MessageBuilder()
        builder.add(chunk.deltas)
        read = builder.message
        message["content"] = read.content or (None if read.tool_calls or read.reasoning_content else "")
        if read.reasoning_content and self._reasoning:
            message["reasoning_content"] = read.reasoning_content
        if read.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in read.tool_calls
            ]
        return message

    def part(self, chunk: TextChunk) -> dict[str, Any]:
        """What a part of the answer adds to the message; empty if it adds nothing."""
        if chunk.deltas is None:
            return {"content": chunk.text} if chunk.text else {}
        return self._added(chunk.deltas)

    def _added(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        added: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    added["content"] = added.get("content", "") + text
                case ReasoningDelta(text) if self._reasoning:
                    added["reasoning_content"] = added.get("reasoning_content", "") + text
                case ToolCallStarted(index, call_id, name):
                    function = {"name": name, "arguments": ""}
                    calls.append({"index": index, "id": call_id, "type": "function", "function": function})
                case ArgumentsDelta(index, text):
                    if not calls or calls[-1]["index"] != index:
                        calls.append({"index": index, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        return {**added, "tool_calls": calls} if calls else added
