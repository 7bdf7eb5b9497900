"""Settings of several values. Pairs of a name and a value: a mapping in a file, NAME=VALUE,NAME=VALUE as a text; and
texts: a list in a file, TEXT,TEXT as a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin


def is_pairs(kind: Any) -> bool:
    """Whether a field of type `kind` holds pairs: Mapping[str, float] or Mapping[str, str]."""
    return get_origin(kind) is Mapping


def describe_pairs(kind: Any) -> str:
    """What such a field takes, for messages."""
    return f"NAME={'NUMBER' if get_args(kind)[1] is float else 'TEXT'} pairs"


def parse_pairs(kind: Any, text: str) -> dict[str, Any]:
    """The pairs that `text` means.

    Raises:
        ValueError: it is not NAME=VALUE,NAME=VALUE, a name is there twice, or a value is not of the kind's type.
    """
    value_kind = get_args(kind)[1]
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals and value.strip() for name, equals, value in pairs):
        raise ValueError(text)
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(text)
    return {name.strip(): value_kind(value.strip()) for name, _, value in pairs}


def normal_pairs(kind: Any, value: object) -> dict[str, Any] | None:
    """`value` with whole numbers as floats where the field wants numbers; None if it is no such pairs."""
    if type(value) is not dict or not value:
        return None
    value_kind = get_args(kind)[1]
    normal = {name: as_float(v) if value_kind is float and type(v) is int else v for name, v in value.items()}
    good = all(type(name) is str and name.strip() and type(v) is value_kind for name, v in normal.items())
    return normal if good else None


def as_float(number: int) -> float:
    """A whole number as a float; one that is larger than any float as infinity, which no setting takes."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def is_texts(kind: Any) -> bool:
    """Whether a field of type `kind` holds several texts: tuple[str, ...]."""
    return get_origin(kind) is tuple


def parse_texts(text: str) -> tuple[str, ...]:
    """The texts in one, with commas between them.

    Raises:
        ValueError: one is blank.
    """
    texts = normal_texts([part.strip() for part in text.split(",")])
    if texts is None:
        raise ValueError(text)
    return texts


def normal_texts(value: object) -> tuple[str, ...] | None:
    """`value` as a tuple; None if it is no list of texts, is empty, or one is blank."""
    if not isinstance(value, list | tuple) or not value:
        return None
    return tuple(value) if all(type(text) is str and text.strip() for text in value) else None
