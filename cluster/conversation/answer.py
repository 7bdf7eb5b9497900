"""An answer, taken apart as it comes: reasoning, content, calls."""

from __future__ import annotations

from collections.abc import Collection

from cluster.conversation.call_ids import openai_id
from cluster.conversation.deltas import Delta
from cluster.conversation.formats.plain import PlainParser
from cluster.conversation.markers import Marker, MarkerScanner
from cluster.conversation.messages import ToolChoiceMode, ToolUse
from cluster.conversation.reasoning_format import ReasoningParser
from cluster.conversation.registry import Formats
from cluster.conversation.tool_format import CallParser
from cluster.conversation.writer import AnswerWriter


class AnswerParser:
    """Reads one answer, in pieces of any size, and says what each piece adds.

    All pieces together give the same message however the answer is cut, and no text is lost: what looks like a call and
    turns out to be none is content, as it was written. From where a call's arguments have begun it is a call; if they
    break off it has the part that came, and what follows them is content.

    Args:
        formats: what the model speaks.
        use: the tools that the request may use; None: none, and calls are not looked for.
        prompt: as the model was given it; its end says whether the answer begins in reasoning.
        special_tokens: markers that are special tokens, which come by `push_token`; spelt as text they mean nothing.
    """

    def __init__(
        self, formats: Formats, use: ToolUse | None = None, prompt: str = "", special_tokens: Collection[str] = ()
    ) -> None:
        tools, reasoning = formats.tools, formats.reasoning
        if use is None or use.choice.mode is ToolChoiceMode.NONE:
            use = None
        reads_channels = tools is not None and tools.reasons
        self._writer = AnswerWriter(
            openai_id if tools is None else tools.new_id,
            max_calls=1 if use is not None and not use.parallel else None,
            reasons=reasoning is not None,
        )
        self._calls: CallParser = PlainParser(self._writer)
        self._call_markers: frozenset[str] = frozenset()
        if tools is not None and (use is not None or reads_channels):
            self._calls, self._call_markers = tools.parser(self._writer, use), frozenset(tools.markers)
        self._markers = self._call_markers
        self._reasoning: ReasoningParser | None = None
        if reasoning is not None and not reads_channels:
            self._reasoning = ReasoningParser(self._writer, reasoning, opened=reasoning.opened_by(prompt))
            self._markers |= {reasoning.begin, reasoning.end}
        self._scanner = MarkerScanner(self._markers - set(special_tokens))

    def push(self, text: str) -> list[Delta]:
        """Take more text; return what it adds."""
        return self._take(self._scanner.push(text))

    def push_token(self, marker: str) -> list[Delta]:
        """Take a special token, by its text; one that is no marker adds nothing."""
        parts = self._scanner.finish()
        return self._take([*parts, Marker(marker)] if marker in self._markers else parts)

    def finish(self) -> list[Delta]:
        """The answer is over; return what was held back."""
        deltas = self._take(self._scanner.finish())
        self._calls.finish()
        self._writer.finish()
        return deltas + self._writer.take()

    @property
    def done(self) -> bool:
        """Whether the answer has all the calls that it may have: nothing that follows matters."""
        return self._writer.done

    @property
    def calls_tools(self) -> bool:
        """Whether the answer has calls, and all of them are whole."""
        return self._writer.calls_tools

    def _take(self, parts: list[str]) -> list[Delta]:
        for part in parts:
            rest = part if self._reasoning is None else self._reasoning.push(part)
            if rest:
                self._calls.push(str(rest) if type(rest) is Marker and rest not in self._call_markers else rest)
        return self._writer.take()
