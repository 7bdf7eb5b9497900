"""What an answer consists of, piece by piece, and put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.conversation.messages import ChatMessage, ToolCall


@dataclass(frozen=True)
class ContentDelta:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCallStarted:
    """A call begins; its arguments follow. `index` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments, which are a JSON object as text."""

    index: int
    text: str


Delta = ContentDelta | ReasoningDelta | ToolCallStarted | ArgumentsDelta


class MessageBuilder:
    """Puts deltas together to the whole message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallStarted, list[str]]] = []

    def add(self, deltas: Iterable[Delta]) -> None:
        """Take more, in order."""
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    self._content.append(text)
                case ReasoningDelta(text):
                    self._reasoning.append(text)
                case ToolCallStarted():
                    self._calls.append((delta, []))
                case ArgumentsDelta(index, text):
                    self._calls[index][1].append(text)

    @property
    def message(self) -> ChatMessage:
        """The message so far."""
        return ChatMessage(
            role="assistant",
            content="".join(self._content),
            reasoning_content="".join(self._reasoning),
            tool_calls=tuple(ToolCall(call.id, call.name, "".join(parts)) for call, parts in self._calls),
        )
