"""What a format of tool calls consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.conversation.call_ids import openai_id
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.messages import ToolUse
from cluster.conversation.template_view import Adapt, unchanged
from cluster.conversation.writer import AnswerWriter


class CallParser(Protocol):
    """Reads an answer behind its reasoning, and writes content and calls."""

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a `Marker` of the format."""
        ...

    def finish(self) -> None:
        """The answer is over."""
        ...


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    Attributes:
        name: in configurations.
        markers: of the format; none may contain another.
        parser: makes what reads an answer.
        syntax: how a call is written, for those that must be made.
        describes: whether a chat template speaks this format.
        aliases: what other programs call it.
        new_id: makes the id of a call.
        reasons: whether the format has reasoning of its own, which its parser reads too.
        adapt: changes a message, as chat templates are given it, to what this format's expect.
    """

    name: str
    markers: tuple[str, ...]
    parser: Callable[[AnswerWriter, ToolUse | None], CallParser]
    syntax: CallSyntax
    describes: Callable[[str], bool]
    aliases: tuple[str, ...] = ()
    new_id: Callable[[], str] = openai_id
    reasons: bool = False
    adapt: Adapt = unchanged
