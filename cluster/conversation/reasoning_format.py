"""Reasoning that stands between two markers at the beginning of an answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.conversation.json_reader import SPACE
from cluster.conversation.markers import Marker
from cluster.conversation.writer import AnswerWriter


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family of models marks its reasoning.

    Attributes:
        name: in configurations.
        begin: the marker before it; a chat template may end the prompt with it.
        end: the marker behind it.
        aliases: what other programs call it.
        behind: what always follows `end`.
        sign: what a chat template that speaks it has in it; empty: `end`.
    """

    name: str
    begin: str
    end: str
    aliases: tuple[str, ...] = ()
    sign: str = ""
    behind: str = ""

    def describes(self, template: str) -> bool:
        """Whether a chat template speaks this format."""
        return (self.sign or self.end) in template

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside reasoning, so that the answer begins there."""
        return prompt.rstrip().endswith(self.begin)

    def left_open_in(self, text: str) -> str:
        """The marker before the reasoning, if a text that is to be gone on with ends inside it; else nothing."""
        return self.begin if text.rfind(self.begin) > text.rfind(self.end) else ""


class _Where(enum.Enum):
    BEFORE = enum.auto()
    INSIDE = enum.auto()
    BEHIND = enum.auto()
    """Spaces are no part of the answer yet."""
    OVER = enum.auto()


class ReasoningParser:
    """Takes the reasoning from the beginning of an answer.

    Args:
        writer: of the answer.
        reasoning: the markers.
        opened: the prompt has opened it.
    """

    def __init__(self, writer: AnswerWriter, reasoning: ReasoningFormat, *, opened: bool) -> None:
        self._writer = writer
        self._format = reasoning
        self._where = _Where.INSIDE if opened else _Where.BEFORE

    def push(self, part: str) -> str:
        """Take a piece of plain text, or a marker of any format; return what is no reasoning of it."""
        where = self._where
        is_begin, is_end = (
            isinstance(part, Marker) and part == mark for mark in (self._format.begin, self._format.end)
        )
        if where is _Where.OVER:
            return part
        if where is _Where.INSIDE:
            if is_end:
                self._where = _Where.BEHIND
                self._writer.end_reasoning()
            elif not is_begin or self._writer.has_reasoning:
                self._writer.reasoning(part)
            return ""
        rest = part if isinstance(part, Marker) else part.lstrip(SPACE)
        if where is _Where.BEFORE and is_begin:
            self._where = _Where.INSIDE
            self._writer.drop()
            return ""
        if where is _Where.BEFORE:
            self._writer.hold(part[: len(part) - len(rest)])
        if rest:
            self._where = _Where.OVER
        return rest


THINK = ReasoningFormat("think", "<think>", "</think>", ("qwen3", "deepseek_r1", "deepseek_v3"))
MISTRAL_THINK = ReasoningFormat("mistral", "[THINK]", "[/THINK]")
HARMONY_REASONING = ReasoningFormat(
    "harmony",
    "<|channel|>analysis<|message|>",
    "<|end|>",
    ("openai", "gpt_oss", "openai_gptoss"),
    sign="<|channel|>analysis<|message|>",
    behind="<|start|>assistant",
)
