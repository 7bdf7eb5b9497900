"""Hermes, Qwen2.5 and Qwen3: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`; one pair a call."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cluster.conversation.call_reader import CallReader
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import Reading
from cluster.conversation.markers import Marker
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

BEGIN, END = "<tool_call>", "</tool_call>"
_JSON = re.compile(r"""\\?["']arguments\\?["']:""")
_OTHERS = ("<function=", "<arg_key>", "<tool_calls>")
"""What other formats write between the same tags, or around them."""


class HermesParser:
    """Reads calls between tags. A tag in a string of a call's arguments is part of the string."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer
        self._call: CallReader | None = None
        self._awaits_end = False
        """A call is whole, and its closing tag has not come."""

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a tag."""
        if self._call is not None and (self._call.in_string or not isinstance(part, Marker)):
            self._read(self._call, part)
        elif isinstance(part, Marker):
            self._tag(part)
        else:
            self._outside(part)

    def finish(self) -> None:
        """The answer is over."""
        if self._awaits_end and not self._writer.held.strip():
            self._writer.drop()

    def _read(self, call: CallReader, text: str) -> None:
        rest = call.push(text)
        if call.state is Reading.OPEN:
            return
        self._call, self._awaits_end = None, call.state is Reading.DONE
        if call.state is Reading.BROKEN:
            self._writer.break_call()
            self._writer.release()
        self._outside(rest)

    def _tag(self, tag: str) -> None:
        if self._call is not None:
            self._call = None
            self._writer.break_call()
            self._writer.release()
        if tag == BEGIN:
            self._writer.hold(tag)
            self._call, self._awaits_end = CallReader(self._writer), False
        elif self._awaits_end:
            self._writer.drop()
            self._awaits_end = False
        else:
            self._writer.content(tag)

    def _outside(self, text: str) -> None:
        self._writer.content(text)
        self._awaits_end = self._awaits_end and not text.strip()


def _has(template: str, texts: Iterable[str]) -> bool:
    return any(text in template for text in texts)


HERMES = ToolFormat(
    name="hermes",
    aliases=("qwen", "qwen25", "qwen3"),
    markers=(BEGIN, END),
    parser=lambda writer, use: HermesParser(writer),
    syntax=CallSyntax(begin='<tool_call>\n{"name": "{name}", "arguments": ', end="}\n</tool_call>", separator="\n"),
    describes=lambda template: BEGIN in template and _JSON.search(template) is not None and not _has(template, _OTHERS),
)
