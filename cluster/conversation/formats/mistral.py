"""Mistral: `[TOOL_CALLS]` and a JSON list of calls, or, newer, `[TOOL_CALLS]name[ARGS]{…}` once a call."""

from __future__ import annotations

import enum

from cluster.conversation.call_ids import mistral_id
from cluster.conversation.call_reader import ArgumentsReader, CallReader, is_name
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import SPACE, Reading
from cluster.conversation.markers import Marker
from cluster.conversation.messages import ToolUse
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class _Where(enum.Enum):
    OUTSIDE = enum.auto()
    BEHIND_MARKER = enum.auto()
    NAME = enum.auto()
    CALL_ID = enum.auto()
    READING = enum.auto()
    IN_LIST = enum.auto()
    """Before a call of a list."""
    BEHIND_ITEM = enum.auto()


class MistralParser:
    """Reads both forms, and `[CALL_ID]` between name and arguments; ids are made anew."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer
        self._where = _Where.OUTSIDE
        self._name = ""
        self._reader: CallReader | ArgumentsReader | None = None

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a marker."""
        if isinstance(part, Marker) and not (self._reader is not None and self._reader.in_string):
            self._marker(part)
            return
        while part:
            part = self._text(part)

    def finish(self) -> None:
        """The answer is over."""

    def _marker(self, marker: str) -> None:
        where = self._where
        if where is _Where.NAME and marker in (CALL_ID, ARGS):
            self._writer.hold(marker)
            self._where = _Where.CALL_ID
            if marker == ARGS:
                self._begin_arguments()
        elif where is _Where.CALL_ID and marker == ARGS:
            self._writer.hold(marker)
            self._begin_arguments()
        elif marker == CALLS:
            if where is not _Where.OUTSIDE:
                self._give_up()
            self._writer.hold(marker)
            self._where, self._name = _Where.BEHIND_MARKER, ""
        else:
            self._give_up()
            self._writer.content(marker)

    def _text(self, text: str) -> str:
        """Take some of the text; return the rest."""
        where = self._where
        if where is _Where.OUTSIDE:
            self._writer.content(text)
            return ""
        if where is _Where.READING and self._reader is not None:
            return self._read(self._reader, text)
        if where is _Where.CALL_ID:
            self._writer.hold(text)
            return ""
        if where is _Where.NAME:
            return self._read_name(text)
        rest = text.lstrip(SPACE)
        self._writer.hold(text[: len(text) - len(rest)])
        return self._structure(rest) if rest else ""

    def _structure(self, text: str) -> str:
        """Take the first character that is no space, behind a marker or in a list."""
        char, where = text[0], self._where
        if where is _Where.BEHIND_ITEM and char in ",]":
            self._writer.hold(char)
            if char == "]":
                self._writer.drop()
            self._where = _Where.IN_LIST if char == "," else _Where.OUTSIDE
            return text[1:]
        if where is _Where.BEHIND_MARKER and char == "[":
            self._writer.hold(char)
            self._where = _Where.IN_LIST
            return text[1:]
        if char == "{" and where in (_Where.BEHIND_MARKER, _Where.IN_LIST):
            self._begin(CallReader(self._writer), in_list=where is _Where.IN_LIST)
        elif where is _Where.BEHIND_MARKER:
            self._where = _Where.NAME
        else:
            self._give_up()
        return text

    def _read_name(self, text: str) -> str:
        """The name goes up to a marker or, where there is none, to the arguments."""
        end = text.find("{")
        if end < 0:
            self._name += text
            self._writer.hold(text)
            return ""
        self._name += text[:end]
        self._writer.hold(text[:end])
        self._begin_arguments()
        return text[end:]

    def _begin_arguments(self) -> None:
        name = self._name.strip(SPACE)
        if is_name(name):
            self._begin(ArgumentsReader(self._writer, name), in_list=False)
        else:
            self._give_up()

    def _begin(self, reader: CallReader | ArgumentsReader, in_list: bool) -> None:
        self._reader, self._where, self._in_list = reader, _Where.READING, in_list

    def _read(self, reader: CallReader | ArgumentsReader, text: str) -> str:
        rest = reader.push(text)
        if reader.state is Reading.DONE:
            self._reader = None
            self._where = _Where.BEHIND_ITEM if self._in_list else _Where.OUTSIDE
        elif reader.state is Reading.BROKEN:
            self._give_up()
        return rest

    def _give_up(self) -> None:
        """What is held, and what follows, is content."""
        self._reader, self._where = None, _Where.OUTSIDE
        self._writer.break_call()
        self._writer.release()


def _parser(writer: AnswerWriter, use: ToolUse | None) -> MistralParser:
    return MistralParser(writer)


MISTRAL = ToolFormat(
    name="mistral",
    markers=(CALLS, CALL_ID, ARGS),
    parser=_parser,
    syntax=CallSyntax(
        begin='{"name": "{name}", "arguments": ',
        end="}",
        section_begin="[TOOL_CALLS][",
        section_end="]",
        separator=", ",
    ),
    describes=lambda template: CALLS in template and ARGS not in template,
    new_id=mistral_id,
)

MISTRAL_V11 = ToolFormat(
    name="mistral_v11",
    markers=(CALLS, CALL_ID, ARGS),
    parser=_parser,
    syntax=CallSyntax(begin="[TOOL_CALLS]{name}[ARGS]", end=""),
    describes=lambda template: CALLS in template and ARGS in template,
    new_id=mistral_id,
)
