"""JSON values of a request, looked at with care: who asks for something else is told what it is and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.errors import InvalidRequestError

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "missing",
}


def as_object(value: object, where: str) -> Mapping[str, Any]:
    """An object.

    Raises:
        InvalidRequestError: it is none; the text calls it `where`.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{where} is {kind(value)}, it must be an object")
    return value


def as_list(value: object, where: str, of: str, longest: int | None = None) -> list[Any]:
    """A list of at most so many entries. Errors as in `as_object`."""
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{where} is {kind(value)}, it must be a list of {of}")
    if longest is not None and len(value) > longest:
        raise InvalidRequestError(f"{where} has {len(value)} entries, at most {longest} are allowed")
    return list(value)


def text_of(values: Mapping[str, Any], key: str, where: str, longest: int | None = None) -> str:
    """The text under a key; empty if it is missing. Errors as in `as_object`."""
    value = values.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{key} is {kind(value)}, it must be a text")
    if longest is not None and len(value) > longest:
        raise InvalidRequestError(f"{where}.{key} has {len(value)} characters, at most {longest} are allowed")
    return value


def kind(value: object) -> str:
    """What a value is, in words."""
    return _KINDS.get(type(value), type(value).__name__)
