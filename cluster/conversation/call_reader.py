"""Calls as JSON, read as they come and written on at once."""

from __future__ import annotations

import enum
import json
from collections.abc import Container

from cluster.conversation.json_reader import SPACE, JsonReader, Reading
from cluster.conversation.writer import AnswerWriter

NAME_KEYS = ("name",)
ARGUMENTS_KEYS = ("arguments", "parameters")
MAX_NAME = 256


class ArgumentsReader:
    """Reads a call's arguments, a JSON object, and writes them on.

    The call starts when its name is known and the text has gone into the object; until then the text is held.
    What breaks the object later ends the call there.

    Attributes:
        state: how far it is.
        started: whether the call has been written.
    """

    def __init__(self, writer: AnswerWriter, name: str | None) -> None:
        self.state = Reading.OPEN
        self.started = False
        self._writer = writer
        self._name = name
        self._json = JsonReader()
        self._first = ""
        """Arguments that have not been written because the call has not started."""

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._json.in_string

    def name_is(self, name: str) -> None:
        """The name, where it is not known from the beginning."""
        self._name = name
        self._write("")

    def push(self, text: str) -> str:
        """Take text; return what follows the object, or breaks it."""
        if not self._first:
            blank = len(text) - len(text.lstrip(SPACE))
            self._writer.hold(text[:blank])
            text = text[blank:]
            if text and text[0] != "{":
                self.state = Reading.BROKEN
                return text
        end = self._json.push(text)
        self.state = self._json.state
        self._write(text[:end])
        if self.state is Reading.BROKEN:
            self._writer.break_call()
        return text[end:]

    def _write(self, text: str) -> None:
        if self.started:
            self._writer.arguments(text)
        else:
            self._first += text
            self._writer.hold(text)
            if self._name is not None and self._first[1:].strip(SPACE):
                self.started = True
                self._writer.start_call(self._name)
                self._writer.arguments(self._first)
        if self.started and self.state is Reading.DONE:
            self._writer.end_call()


class _Phase(enum.Enum):
    OPENING = enum.auto()
    KEY = enum.auto()
    FIRST_KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    COMMA = enum.auto()


_FOLLOWS = {
    (_Phase.OPENING, "{"): _Phase.FIRST_KEY,
    (_Phase.COLON, ":"): _Phase.VALUE,
    (_Phase.COMMA, ","): _Phase.KEY,
}
_CLOSES = ((_Phase.FIRST_KEY, "}"), (_Phase.COMMA, "}"))


class CallReader:
    """Reads one call as a JSON object with a name and arguments, in any order, beside whatever else it has.

    Args:
        writer: of the answer.
        names: functions that there are: an object that names another is no call. None: any name will do.
        needs_arguments: whether an object without arguments is no call; else it is one with none.

    Attributes:
        state: how far it is. BROKEN: what it has not written is held.
    """

    def __init__(
        self, writer: AnswerWriter, names: Container[str] | None = None, *, needs_arguments: bool = False
    ) -> None:
        self.state = Reading.OPEN
        self._writer = writer
        self._names = names
        self._needs_arguments = needs_arguments
        self._phase = _Phase.OPENING
        self._key = ""
        self._name: str | None = None
        self._text = ""
        self._value: JsonReader | None = None
        self._arguments: ArgumentsReader | None = None
        self._in_arguments = False
        self._whole_arguments: str | None = None
        """Arguments that came as a string with an object in it, or as null."""

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        reader = self._arguments if self._in_arguments else self._value
        return reader is not None and reader.in_string

    @property
    def started(self) -> bool:
        """Whether the call has been written."""
        return self._arguments is not None and self._arguments.started

    def push(self, text: str) -> str:
        """Take text; return what follows the call, or breaks it."""
        while text and self.state is Reading.OPEN:
            if self._arguments is not None and self._in_arguments:
                text = self._arguments.push(text)
                self._in_arguments = self._arguments.state is Reading.OPEN
                self._take_state(self._arguments.state)
            elif self._value is not None:
                text = self._push_value(self._value, text)
            elif text[0] in SPACE:
                rest = text.lstrip(SPACE)
                self._hold(text[: len(text) - len(rest)])
                text = rest
            else:
                text = self._structure(text)
        return text

    def _structure(self, text: str) -> str:
        """Take a character outside keys and values, or begin one."""
        char, phase = text[0], self._phase
        if phase is _Phase.VALUE and self._is_repeated:
            self.state = Reading.BROKEN
        elif phase is _Phase.VALUE and char == "{" and self._key in ARGUMENTS_KEYS:
            self._arguments, self._in_arguments = ArgumentsReader(self._writer, self._name), True
        elif phase is _Phase.VALUE or (phase in (_Phase.KEY, _Phase.FIRST_KEY) and char == '"'):
            self._value, self._text = JsonReader(), ""
        elif (phase, char) in _CLOSES:
            self._hold(char)
            self._end()
            return text[1:]
        elif (phase, char) in _FOLLOWS:
            self._hold(char)
            self._phase = _FOLLOWS[phase, char]
            return text[1:]
        else:
            self.state = Reading.BROKEN
        return text

    @property
    def _is_repeated(self) -> bool:
        """Whether the key's value has been there before."""
        if self._key in NAME_KEYS:
            return self._name is not None
        has_arguments = self._arguments is not None or self._whole_arguments is not None
        return self._key in ARGUMENTS_KEYS and has_arguments

    def _push_value(self, value: JsonReader, text: str) -> str:
        """Read on in a key, or in a value that is not the arguments' object."""
        end = value.push(text)
        self._text += text[:end]
        self._hold(text[:end])
        if value.state is not Reading.OPEN:
            self._value = None
            is_key = self._phase is not _Phase.VALUE
            self._take_state(value.state)
            if value.state is Reading.DONE:
                self._take_value(json.loads(self._text), is_key)
        return text[end:]

    def _take_state(self, state: Reading) -> None:
        if state is Reading.DONE:
            self._phase = _Phase.COMMA
        elif state is Reading.BROKEN:
            self.state = Reading.BROKEN

    def _take_value(self, value: object, is_key: bool) -> None:
        if is_key:
            self._key, self._phase = str(value), _Phase.COLON
        elif self._key in NAME_KEYS:
            self._take_name(value)
        elif self._key in ARGUMENTS_KEYS:
            self._whole_arguments = "{}" if value is None else str(value)
            if value is not None and not (isinstance(value, str) and _is_object(value)):
                self.state = Reading.BROKEN

    def _take_name(self, name: object) -> None:
        if not is_name(name) or (self._names is not None and name not in self._names):
            self.state = Reading.BROKEN
            return
        self._name = str(name)
        if self._arguments is not None:
            self._arguments.name_is(self._name)

    def _end(self) -> None:
        """The object is closed."""
        if self.started:
            self.state = Reading.DONE
        elif self._name is None or (self._needs_arguments and self._whole_arguments is None):
            self.state = Reading.BROKEN
        else:
            self.state = Reading.DONE
            self._writer.start_call(self._name)
            self._writer.arguments(self._whole_arguments or "{}")
            self._writer.end_call()

    def _hold(self, text: str) -> None:
        if not self.started:
            self._writer.hold(text)


def is_name(name: object) -> bool:
    """Whether a function may be called that."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and not name.isspace()


def _is_object(text: str) -> bool:
    """Whether a text is one JSON object and nothing else."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        return False  # half of a character: no door could send it
    reader = JsonReader()
    end = reader.push(text)
    return reader.state is Reading.DONE and text.lstrip(SPACE).startswith("{") and not text[end:].strip(SPACE)
