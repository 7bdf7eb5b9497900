"""Llama 3.1 to 3.3: an answer that is a JSON object with name and parameters, or several between semicolons."""

from __future__ import annotations

from cluster.conversation.call_reader import CallReader
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import SPACE, Reading
from cluster.conversation.markers import Marker
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

PYTHON_TAG = "<|python_tag|>"


class Llama3Parser:
    """Reads calls at the beginning of the answer, behind `<|python_tag|>`, and behind other calls.

    There is no sign of a call but its form, so an object is one only if it has parameters and names a function that the
    request knows. Code behind the tag, for tools that are built in, is content.
    """

    def __init__(self, writer: AnswerWriter, names: frozenset[str]) -> None:
        self._writer = writer
        self._names = names
        self._call: CallReader | None = None
        self._may_begin = True

    def push(self, part: str) -> None:
        """Take a piece of plain text, or the tag."""
        if isinstance(part, Marker) and not (self._call is not None and self._call.in_string):
            if self._call is not None:
                self._give_up()
            self._writer.hold(part)
            self._may_begin = True
            return
        while part:
            part = self._begin(part) if self._call is None else self._read(self._call, part)

    def finish(self) -> None:
        """The answer is over."""

    def _begin(self, text: str) -> str:
        """Look for the beginning of a call, where one may stand."""
        rest = text.lstrip(SPACE)
        if not self._may_begin:
            self._writer.content(text)
            return ""
        self._writer.hold(text[: len(text) - len(rest)])
        if rest.startswith("{"):
            self._call = CallReader(self._writer, self._names, needs_arguments=True)
        elif rest.startswith(";") and self._writer.num_calls and ";" not in self._writer.held:
            self._writer.hold(";")
            return rest[1:]
        elif rest:
            self._give_up()
        return rest

    def _read(self, call: CallReader, text: str) -> str:
        rest = call.push(text)
        if call.state is Reading.DONE:
            self._call = None
        elif call.state is Reading.BROKEN:
            self._give_up()
        return rest

    def _give_up(self) -> None:
        """What is held, and what follows, is content."""
        self._call, self._may_begin = None, False
        self._writer.break_call()
        self._writer.release()


LLAMA3_JSON = ToolFormat(
    name="llama3_json",
    aliases=("llama3", "llama"),
    markers=(PYTHON_TAG,),
    parser=lambda writer, use: Llama3Parser(writer, frozenset() if use is None else use.names),
    syntax=CallSyntax(begin='{"name": "{name}", "parameters": ', end="}", separator="; "),
    describes=lambda template: "<|start_header_id|>" in template and '"parameters": ' in template,
)
