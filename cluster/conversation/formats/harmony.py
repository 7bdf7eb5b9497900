"""gpt-oss: harmony, where an answer is messages with a channel each: analysis, commentary (calls, preambles), final."""

from __future__ import annotations

import enum
import re
from typing import Any

from cluster.conversation.call_reader import ArgumentsReader, is_name
from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.json_reader import Reading
from cluster.conversation.markers import Marker
from cluster.conversation.tool_format import ToolFormat
from cluster.conversation.writer import AnswerWriter

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
_HEADER = re.compile(
    r"\s*(?:assistant)?(?:\s*to=(?P<to>[^\s<]+))?\s*"
    r"(?:<\|channel\|>\s*(?P<channel>analysis|commentary|final)(?:\s+to=(?P<channel_to>[^\s<]+))?\s*"
    r"(?:<\|constrain\|>\s*[A-Za-z]{1,32}|json|code)?\s*)?"
)
_WORDS = ("assistant", "analysis", "commentary", "final", "json", "code", "to=")
_FUNCTIONS = "functions."
_ROLE = "assistant"


class _Where(enum.Enum):
    HEADER = enum.auto()
    ANALYSIS = enum.auto()
    SPOKEN = enum.auto()
    CALL = enum.auto()
    BETWEEN = enum.auto()
    """Behind a message."""


class HarmonyParser:
    """Reads messages: analysis is reasoning, what goes to `functions.…` is a call, and all else is content.

    An answer begins in the header of its first message, whose `<|start|>assistant` ends the prompt.
    """

    def __init__(self, writer: AnswerWriter, calls: bool) -> None:
        self._writer = writer
        self._calls = calls
        self._where = _Where.HEADER
        self._header = ""
        self._has_spoken = False
        self._arguments: ArgumentsReader | None = None

    def push(self, part: str) -> None:
        """Take a piece of plain text, or a special token."""
        if isinstance(part, Marker) and not (self._arguments is not None and self._arguments.in_string):
            self._token(part)
        elif self._where is _Where.HEADER:
            self._header += part
            self._writer.hold(part)
        elif self._where is _Where.ANALYSIS:
            self._writer.reasoning(part)
        elif self._where is _Where.CALL and self._arguments is not None:
            self._read(self._arguments, part)
        else:
            self._writer.content(part)

    def finish(self) -> None:
        """The answer is over; a header that was cut off says nothing."""
        words = self._header.replace(CHANNEL, " ").replace(CONSTRAIN, " ").split()
        if self._where is _Where.HEADER and all(word.startswith("to=") or _begins_word(word) for word in words):
            self._writer.drop()

    def _token(self, token: str) -> None:
        if self._where is _Where.HEADER and token in (CHANNEL, CONSTRAIN):
            self._header += token
            self._writer.hold(token)
        elif self._where is _Where.HEADER and token == MESSAGE:
            self._begin_message()
        elif token in (END, RETURN, CALL):
            self._end_message()
        elif token in (START, CHANNEL):
            # A message that was not ended ends where the next one begins.
            self._end_message()
            self._where, self._header = _Where.HEADER, token if token == CHANNEL else ""
            self._writer.hold(token)
        else:
            self._end_message()
            self._writer.content(token)

    def _begin_message(self) -> None:
        header = _HEADER.fullmatch(self._header)
        if header is None:
            self._writer.content(MESSAGE)
            self._where = _Where.SPOKEN
            return
        name = header["channel_to"] or header["to"] or ""
        if self._calls and name.startswith(_FUNCTIONS) and is_name(name.removeprefix(_FUNCTIONS)):
            self._writer.hold(MESSAGE)
            self._where = _Where.CALL
            self._arguments = ArgumentsReader(self._writer, name.removeprefix(_FUNCTIONS))
            return
        self._writer.drop()
        if header["channel"] == "analysis" and self._writer.reasons:
            self._where = _Where.ANALYSIS
            self._writer.next_reasoning()
        else:
            self._where = _Where.SPOKEN
            self._writer.hold("\n" if self._has_spoken else "")
            self._has_spoken = True

    def _end_message(self) -> None:
        if self._where is _Where.ANALYSIS:
            self._writer.end_reasoning()
        else:
            # A call that has not become whole is broken off here.
            self._writer.break_call()
            self._writer.release()
        self._arguments, self._where = None, _Where.BETWEEN

    def _read(self, arguments: ArgumentsReader, text: str) -> None:
        rest = arguments.push(text)
        if arguments.state is Reading.BROKEN:
            self._writer.break_call()
            self._writer.release()
        if arguments.state is not Reading.OPEN:
            self._arguments, self._where = None, _Where.SPOKEN
            self._writer.content(rest)


def _begins_word(text: str) -> bool:
    """Whether a text is a word of a header, or the beginning of one."""
    return any(word.startswith(text) for word in _WORDS)


def _adapt(message: dict[str, Any]) -> dict[str, Any]:
    """The template calls reasoning `thinking`, and takes only one of thinking and content beside calls."""
    if message.get("role") != _ROLE:
        return message
    adapted = {key: value for key, value in message.items() if key not in ("content", "reasoning_content")}
    content, thinking = message.get("content") or "", message.get("reasoning_content") or ""
    if message.get("tool_calls"):
        thinking = "\n".join(text for text in (thinking, content) if text)
    else:
        adapted["content"] = content
    return {**adapted, "thinking": thinking} if thinking else adapted


HARMONY = ToolFormat(
    name="harmony",
    aliases=("openai", "gpt_oss"),
    markers=(START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL),
    parser=lambda writer, use: HarmonyParser(writer, use is not None),
    syntax=CallSyntax(
        begin=f"{CHANNEL}commentary to={_FUNCTIONS}{{name}} {CONSTRAIN}json{MESSAGE}",
        # `<|call|>` is an end-of-sequence token.
        end="",
        parallel=False,
    ),
    describes=lambda template: CHANNEL in template and MESSAGE in template,
    reasons=True,
    adapt=_adapt,
)
