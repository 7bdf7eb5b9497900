"""JSON as it comes: how far a text is the beginning of a JSON value."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping

SPACE = " \t\r\n"
MAX_DEPTH = 128
_MAX_SCALAR = 512
_STRING_BODY = re.compile(r'[^"\\\x00-\x1f]*')
_LONG_NUMBER = re.compile(rf"[-+.\deE]{{{_MAX_SCALAR + 1}}}")
_LITERALS = ("true", "false", "null")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_NUMBER_SO_FAR = re.compile(r"-?(?:(?:0|[1-9]\d*)(?:\.\d*|(?:\.\d+)?[eE][+-]?\d*)?)?")
_HEX = "0123456789abcdefABCDEF"


class Reading(enum.Enum):
    """How far a reader is."""

    OPEN = enum.auto()
    """More is to come."""
    DONE = enum.auto()
    """It has all that it wants."""
    BROKEN = enum.auto()
    """What came cannot be part of it."""


class _Expect(enum.Enum):
    VALUE = enum.auto()
    FIRST_VALUE = enum.auto()
    KEY = enum.auto()
    FIRST_KEY = enum.auto()
    COLON = enum.auto()
    COMMA = enum.auto()
    STRING = enum.auto()
    SCALAR = enum.auto()


class JsonReader:
    """Follows one JSON value (RFC 8259) through text in pieces, without building it.

    Attributes:
        state: DONE once the value is whole, BROKEN at the first character that no JSON value can go on with. Values
            nested deeper than `MAX_DEPTH`, and numbers of more than 512 characters, are taken for broken.
    """

    def __init__(self) -> None:
        self.state = Reading.OPEN
        self._expect = _Expect.VALUE
        self._closers: list[str] = []
        self._scalar = ""
        self._is_key = False
        self._escape = 0
        """In a string: 0 outside an escape, -1 behind a backslash, else hexadecimal digits that are missing."""

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._expect is _Expect.STRING

    def push(self, text: str, at: int = 0) -> int:
        """Take text from `at` on; return where it stopped: behind the value, at what breaks it, or at the end."""
        while at < len(text) and self.state is Reading.OPEN:
            if self._expect is _Expect.STRING:
                at = self._string(text, at)
            elif self._expect is _Expect.SCALAR:
                at += self._go_on_scalar(text[at])
            elif text[at] in SPACE or self._structure(text[at]):
                at += 1
            else:
                self.state = Reading.BROKEN
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escape == 0:
            body = _STRING_BODY.match(text, at)
            at = body.end() if body is not None else at
            if at == len(text):
                return at
        char = text[at]
        if self._escape > 0 and char in _HEX:
            self._escape -= 1
        elif self._escape < 0 and char in '"\\/bfnrtu':
            self._escape = 4 if char == "u" else 0
        elif self._escape == 0 and char == "\\":
            self._escape = -1
        elif self._escape == 0 and char == '"':
            self._end_string()
        else:
            self.state = Reading.BROKEN
            return at
        return at + 1

    def _end_string(self) -> None:
        if self._is_key:
            self._expect = _Expect.COLON
        else:
            self._end_value()

    def _go_on_scalar(self, char: str) -> int:
        """Take one more character of a number or literal; 0 if it is not part of it."""
        longer = self._scalar + char
        if any(literal.startswith(longer) for literal in _LITERALS) or _NUMBER_SO_FAR.fullmatch(longer):
            self._scalar = longer
            if longer in _LITERALS:
                self._end_value()
            elif len(longer) > _MAX_SCALAR:
                self.state = Reading.BROKEN
            return 1
        if _NUMBER.fullmatch(self._scalar):
            self._end_value()
        else:
            self.state = Reading.BROKEN
        return 0

    def _structure(self, char: str) -> bool:
        """Take a character outside strings and scalars; whether it may stand there."""
        expect = self._expect
        if expect in (_Expect.VALUE, _Expect.FIRST_VALUE):
            if expect is _Expect.FIRST_VALUE and char == "]":
                return self._close(char)
            return self._begin_value(char)
        if expect in (_Expect.KEY, _Expect.FIRST_KEY):
            if expect is _Expect.FIRST_KEY and char == "}":
                return self._close(char)
            self._expect, self._is_key = _Expect.STRING, True
            return char == '"'
        if expect is _Expect.COLON:
            self._expect = _Expect.VALUE
            return char == ":"
        if char == ",":
            self._expect = _Expect.KEY if self._closers[-1] == "}" else _Expect.VALUE
            return True
        return self._close(char)

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._expect = _Expect.FIRST_KEY if char == "{" else _Expect.FIRST_VALUE
            return len(self._closers) <= MAX_DEPTH
        if char == '"':
            self._expect, self._is_key = _Expect.STRING, False
            return True
        self._expect, self._scalar = _Expect.SCALAR, ""
        return char in "-0123456789tfn" and self._go_on_scalar(char) == 1

    def _close(self, char: str) -> bool:
        if not self._closers or self._closers[-1] != char:
            return False
        self._closers.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._expect = _Expect.COMMA
        if not self._closers:
            self.state = Reading.DONE


def is_json(text: str) -> bool:
    """Whether a text, without space around it, is one JSON value (RFC 8259), no deeper than `MAX_DEPTH`.

    Found out by a parser in C: a reader in Python takes half a minute for 10 MB.
    """
    if text[:1].isspace() or text[-1:].isspace():
        return False
    number = _short if _LONG_NUMBER.search(text) else None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=number, parse_float=number)
    except (ValueError, RecursionError):
        return False
    return text.count("[") + text.count("{") <= MAX_DEPTH or not is_deeper(value, MAX_DEPTH)


def _short(number: str) -> str:
    if len(number) > _MAX_SCALAR:
        raise ValueError(number[:_MAX_SCALAR])
    return number


def _refuse(constant: str) -> None:
    """NaN and infinity are no JSON."""
    raise ValueError(constant)


def is_deeper(value: object, most: int) -> bool:
    """Whether a JSON value is nested deeper than so many levels."""
    level = [value]
    for _ in range(most):
        level = [each for outer in level for each in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list) else []
