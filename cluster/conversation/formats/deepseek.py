"""DeepSeek V3 and R1 (name, then JSON in a code fence) and V3.1 (name and JSON side by side), in the same markers."""

from __future__ import annotations

import enum

from cluster.conversation.call_reader import ArgumentsReader, is_name
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import SPACE, Reading
from cluster.conversation.markers import Marker
from cluster.conversation.messages import ToolUse
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"
_KIND = "function"


class _Where(enum.Enum):
    OUTSIDE = enum.auto()
    BETWEEN = enum.auto()
    """In the section of calls, in none of them."""
    HEAD = enum.auto()
    """Before the separator: the name, or what kind of tool it is."""
    BEHIND_SEPARATOR = enum.auto()
    NAME = enum.auto()
    """Behind it, up to the fence: the name after all."""
    READING = enum.auto()
    TAIL = enum.auto()


class DeepSeekParser:
    """Reads both forms: where a brace follows the separator, the name stood before it."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer
        self._where = _Where.OUTSIDE
        self._head = self._name = self._tail = ""
        self._arguments: ArgumentsReader | None = None

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a marker."""
        if isinstance(part, Marker) and not (self._arguments is not None and self._arguments.in_string):
            self._marker(part)
            return
        while part:
            part = self._text(part)

    def finish(self) -> None:
        """The answer is over."""
        if self._where is _Where.TAIL and self._tail_is_form:
            self._writer.drop()

    def _marker(self, marker: str) -> None:
        where = self._where
        if where is _Where.TAIL:
            self._end_tail()
            if marker == CALL_END:
                self._writer.drop()
                return
            where = self._where
        if marker == CALLS_BEGIN and where is _Where.OUTSIDE:
            self._go(_Where.BETWEEN, marker)
        elif marker == CALL_BEGIN and where in (_Where.OUTSIDE, _Where.BETWEEN):
            self._head = self._name = self._tail = ""
            self._go(_Where.HEAD, marker)
        elif marker == CALLS_END and where is _Where.BETWEEN:
            self._go(_Where.OUTSIDE, marker)
            if self._writer.num_calls:
                self._writer.drop()
        elif marker == SEPARATOR and where is _Where.HEAD:
            self._go(_Where.BEHIND_SEPARATOR, marker)
        else:
            self._give_up(_Where.OUTSIDE if where is _Where.OUTSIDE else _Where.BETWEEN)
            if marker == CALL_BEGIN:
                self._marker(marker)
            else:
                self._writer.content(marker)

    def _go(self, where: _Where, marker: str) -> None:
        self._where = where
        self._writer.hold(marker)

    def _text(self, text: str) -> str:
        """Take some of the text; return the rest."""
        where = self._where
        if where is _Where.READING and self._arguments is not None:
            return self._read(self._arguments, text)
        if where is _Where.BEHIND_SEPARATOR:
            return self._behind_separator(text)
        if where is _Where.NAME:
            return self._read_name(text)
        if where in (_Where.OUTSIDE, _Where.BETWEEN):
            self._writer.content(text)
            return ""
        self._writer.hold(text)
        if where is _Where.HEAD:
            self._head += text
        else:
            self._tail += text
        return ""

    def _behind_separator(self, text: str) -> str:
        rest = text.lstrip(SPACE)
        self._writer.hold(text[: len(text) - len(rest)])
        if rest.startswith("{"):
            self._begin_arguments(self._head)
        elif rest:
            self._where = _Where.NAME
        return rest

    def _read_name(self, text: str) -> str:
        """The name, `json` behind a fence, and the brace with which the arguments begin."""
        end = text.find("{")
        taken = text if end < 0 else text[:end]
        self._name += taken
        self._writer.hold(taken)
        if end < 0:
            return ""
        name, fence, language = self._name.partition(FENCE)
        if fence and language.strip(SPACE) in ("json", "") and self._head.strip(SPACE) == _KIND:
            self._begin_arguments(name)
        else:
            self._give_up(_Where.BETWEEN)
        return text[end:]

    def _begin_arguments(self, name: str) -> None:
        name = name.strip(SPACE)
        if is_name(name):
            self._arguments, self._where = ArgumentsReader(self._writer, name), _Where.READING
        else:
            self._give_up(_Where.BETWEEN)

    def _read(self, arguments: ArgumentsReader, text: str) -> str:
        rest = arguments.push(text)
        if arguments.state is Reading.DONE:
            self._arguments, self._where = None, _Where.TAIL
        elif arguments.state is Reading.BROKEN:
            self._give_up(_Where.BETWEEN)
        return rest

    @property
    def _tail_is_form(self) -> bool:
        return self._tail.strip(SPACE) in ("", FENCE)

    def _end_tail(self) -> None:
        """A marker follows a call: what stood between is its fence, or content."""
        if self._tail_is_form:
            self._writer.drop()
        else:
            self._writer.release()
        self._where, self._tail = _Where.BETWEEN, ""

    def _give_up(self, where: _Where) -> None:
        """What is held is content."""
        self._arguments, self._where = None, where
        self._writer.break_call()
        self._writer.release()


def _parser(writer: AnswerWriter, use: ToolUse | None) -> DeepSeekParser:
    return DeepSeekParser(writer)


_MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    aliases=("deepseek", "deepseek_r1"),
    markers=_MARKERS,
    parser=_parser,
    syntax=CallSyntax(
        begin=f"{CALL_BEGIN}{_KIND}{SEPARATOR}{{name}}\n{FENCE}json\n",
        end=f"\n{FENCE}{CALL_END}",
        section_begin=CALLS_BEGIN,
        section_end=CALLS_END,
        separator="\n",
    ),
    describes=lambda template: CALL_BEGIN in template and f"{FENCE}json" in template,
)

DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    markers=_MARKERS,
    parser=_parser,
    syntax=CallSyntax(
        begin=f"{CALL_BEGIN}{{name}}{SEPARATOR}", end=CALL_END, section_begin=CALLS_BEGIN, section_end=CALLS_END
    ),
    describes=lambda template: CALL_BEGIN in template and f"{FENCE}json" not in template,
)
