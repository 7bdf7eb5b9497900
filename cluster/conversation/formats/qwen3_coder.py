"""Qwen3-Coder: `<tool_call>`, `<function=name>`, one `<parameter=name>` element a parameter, and closing tags."""

from __future__ import annotations

import enum
import json

from cluster.conversation.call_reader import is_name
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import SPACE, is_json
from cluster.conversation.markers import Marker
from cluster.conversation.messages import Tool
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION_BEGIN, FUNCTION_END = "<function=", "</function>"
PARAMETER_BEGIN, PARAMETER_END = "<parameter=", "</parameter>"


class _Where(enum.Enum):
    OUTSIDE = enum.auto()
    IN_CALL = enum.auto()
    FUNCTION_NAME = enum.auto()
    IN_FUNCTION = enum.auto()
    PARAMETER_NAME = enum.auto()
    VALUE = enum.auto()
    BEHIND_FUNCTION = enum.auto()


_EXPECTED = {
    (_Where.OUTSIDE, CALL_BEGIN): _Where.IN_CALL,
    (_Where.OUTSIDE, FUNCTION_BEGIN): _Where.FUNCTION_NAME,
    (_Where.IN_CALL, FUNCTION_BEGIN): _Where.FUNCTION_NAME,
    (_Where.IN_FUNCTION, PARAMETER_BEGIN): _Where.PARAMETER_NAME,
    (_Where.IN_FUNCTION, FUNCTION_END): _Where.BEHIND_FUNCTION,
    (_Where.VALUE, PARAMETER_END): _Where.IN_FUNCTION,
    (_Where.BEHIND_FUNCTION, CALL_END): _Where.OUTSIDE,
    (_Where.BEHIND_FUNCTION, CALL_BEGIN): _Where.IN_CALL,
    (_Where.BEHIND_FUNCTION, FUNCTION_BEGIN): _Where.FUNCTION_NAME,
}
"""The tag that may come in each place, and where it leads."""


class Qwen3CoderParser:
    """Reads elements and writes their values as JSON, by the types that the tools' schemas give them.

    A string is written on as it comes. Any other value waits for its end, and is a string if it is no JSON.
    """

    def __init__(self, writer: AnswerWriter, tools: tuple[Tool, ...]) -> None:
        self._writer = writer
        self._tools = {tool.name: tool for tool in tools}
        self._where = _Where.OUTSIDE
        self._name = self._parameter = ""
        self._num_parameters = 0
        self._value: _StringValue | _OtherValue | None = None

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a tag."""
        if isinstance(part, Marker) and not (self._where is _Where.VALUE and part != PARAMETER_END):
            self._tag(part)
            return
        while part:
            part = self._text(part)

    def finish(self) -> None:
        """The answer is over."""
        if self._where is _Where.BEHIND_FUNCTION and not self._writer.held.strip(SPACE):
            self._writer.drop()

    def _tag(self, tag: str) -> None:
        follows = _EXPECTED.get((self._where, tag))
        if follows is None:
            self._give_up()
            if (self._where, tag) in _EXPECTED:
                self._tag(tag)
            else:
                self._writer.content(tag)
            return
        if self._where is _Where.BEHIND_FUNCTION:
            self._writer.drop()
        if tag == PARAMETER_END and self._value is not None:
            self._writer.arguments(self._value.finish())
        elif tag == FUNCTION_END:
            self._end_call()
        elif tag != CALL_END:
            self._writer.hold(tag)
        if follows is _Where.FUNCTION_NAME:
            self._name = ""
        self._where, self._parameter = follows, ""

    def _text(self, text: str) -> str:
        """Take some of the text; return the rest."""
        where = self._where
        if where is _Where.VALUE and self._value is not None:
            self._writer.arguments(self._value.push(text))
            return ""
        if where in (_Where.FUNCTION_NAME, _Where.PARAMETER_NAME):
            return self._read_name(text)
        if where is _Where.OUTSIDE:
            self._writer.content(text)
            return ""
        rest = text.lstrip(SPACE)
        self._writer.hold(text[: len(text) - len(rest)])
        if rest:
            self._give_up()
        return rest

    def _read_name(self, text: str) -> str:
        end = text.find(">")
        taken = text if end < 0 else text[:end]
        self._writer.hold(taken)
        is_function = self._where is _Where.FUNCTION_NAME
        if is_function:
            self._name += taken
        else:
            self._parameter += taken
        if end < 0:
            return ""
        if not is_name((self._name if is_function else self._parameter).strip(SPACE)):
            self._give_up()
            return text[end:]
        self._writer.hold(">")
        if is_function:
            self._where, self._num_parameters = _Where.IN_FUNCTION, 0
        else:
            self._begin_value()
        return text[end + 1 :]

    def _begin_value(self) -> None:
        name, parameter = self._name.strip(SPACE), self._parameter.strip(SPACE)
        if self._num_parameters == 0:
            self._writer.start_call(name)
        self._writer.drop()
        self._writer.arguments(("{" if self._num_parameters == 0 else ", ") + json.dumps(parameter) + ": ")
        self._num_parameters += 1
        tool = self._tools.get(name)
        kind = None if tool is None else tool.property_type(parameter)
        self._value = _StringValue() if kind == "string" else _OtherValue(kind)
        self._where = _Where.VALUE

    def _end_call(self) -> None:
        if self._num_parameters == 0:
            self._writer.start_call(self._name.strip(SPACE))
            self._writer.arguments("{")
        self._writer.drop()
        self._writer.arguments("}")
        self._writer.end_call()

    def _give_up(self) -> None:
        """What is held, and what follows, is content."""
        self._where = _Where.OUTSIDE
        self._writer.break_call()
        self._writer.release()


class _StringValue:
    """A string, written as it comes, without the line breaks behind its opening and before its closing tag."""

    def __init__(self) -> None:
        self._begun = False
        self._line_end = ""

    def push(self, text: str) -> str:
        """Take some of the value; return JSON."""
        opening = "" if self._begun else '"'
        if not self._begun and text.startswith("\n"):
            text = text[1:]
        self._begun = True
        text = self._line_end + text
        self._line_end = "\n" if text.endswith("\n") else ""
        return opening + json.dumps(text.removesuffix("\n"), ensure_ascii=False)[1:-1]

    def finish(self) -> str:
        """The rest of the JSON."""
        return '"' if self._begun else '""'


class _OtherValue:
    """A value of another type, or of one that is not known."""

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._parts: list[str] = []

    def push(self, text: str) -> str:
        """Take some of the value; nothing of it is certain."""
        self._parts.append(text)
        return ""

    def finish(self) -> str:
        """The value as JSON."""
        text = "".join(self._parts).removeprefix("\n").removesuffix("\n")
        value = text.strip(SPACE)
        if self._kind == "boolean" and value.lower() in ("true", "false"):
            return value.lower()
        if is_json(value):
            return value
        return json.dumps(text, ensure_ascii=False)


QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    aliases=("qwen3_xml",),
    markers=(CALL_BEGIN, CALL_END, FUNCTION_BEGIN, FUNCTION_END, PARAMETER_BEGIN, PARAMETER_END),
    parser=lambda writer, use: Qwen3CoderParser(writer, () if use is None else use.tools),
    syntax=CallSyntax(
        begin="<tool_call>\n<function={name}>\n",
        end="</function>\n</tool_call>",
        separator="\n",
        xml_parameters=True,
    ),
    describes=lambda template: CALL_BEGIN in template and FUNCTION_BEGIN in template,
)
