"""Turns values from a file or a text into typed, checked dataclass fields; every refusal names the key."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from cluster.config.mappings import (
    as_float,
    describe_pairs,
    is_pairs,
    is_texts,
    normal_pairs,
    normal_texts,
    parse_pairs,
    parse_texts,
)
from cluster.config.shown import shown
from workers.errors import ConfigError

T = TypeVar("T")

_TYPE_NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONE = ("", "none", "null", "~")
_AUTO = "auto"
"""Another way to leave an optional number open."""


def check_key(key: str, known: Iterable[str], what: str = "configuration key") -> None:
    """Refuse a key that is not known, naming the nearest one that is.

    Raises:
        ConfigError: `key` is not in `known`.
    """
    known = list(known)
    if key in known:
        return
    # A right name in the wrong section is nearer than its spelling says.
    same_name = [k for k in known if "." in key and k.endswith(key[key.index(".") :])]
    section_known = any(k.startswith(f"{key.partition('.')[0]}.") for k in known)
    like = same_name[:1] if section_known and same_name else same_name or _of_nearest_section(key, known)
    nearest = difflib.get_close_matches(key, like, n=1, cutoff=0.0)
    raise ConfigError(f"unknown {what} {key}; did you mean {nearest[0]}?")


def _of_nearest_section(key: str, known: list[str]) -> list[str]:
    """The keys of the section that is meant, where its name is misspelt; all, where it is not or cannot be told.

    Of such a section's keys, the section itself is meant where none is like the key.
    """
    section, dot, name = key.partition(".")
    sections = {k.partition(".")[0] for k in known if "." in k}
    if not dot or section in sections:
        return known
    meant = difflib.get_close_matches(section, sections, n=1)
    if not meant:
        return known
    names = [k.partition(".")[2] for k in known if k.startswith(f"{meant[0]}.")]
    near = difflib.get_close_matches(name, names, n=1)
    return [f"{meant[0]}.{near[0]}" if near else meant[0]]


def parse_text(key: str, cls: type[Any], name: str, text: str) -> Any:
    """The value that `text` means for field `name` of `cls`; an optional field takes "none".

    Raises:
        ConfigError: the text is no value of the field's type; it is called `key` in the message.
    """
    kind, optional = kind_of(cls, name)
    stripped = text.strip()
    rules = next(f for f in fields(cls) if f.name == name).metadata
    if rules.get("not_blank") and not stripped:
        raise ConfigError(f"{key} is empty; give a value, or none to run without")
    if optional and (stripped.lower() in _NONE or (kind is not str and stripped.lower() == _AUTO)):
        return None
    try:
        if is_pairs(kind):
            return parse_pairs(kind, stripped)
        if is_texts(kind):
            return parse_texts(stripped)
        if kind is bool:
            return _BOOLS[stripped.lower()]
        return text if kind is str else kind(stripped)
    except (KeyError, ValueError):
        raise ConfigError(_wrong_type(key, cls, name, text)) from None


def build(section: str, cls: type[T], values: Mapping[str, Any]) -> T:
    """Make the dataclass `cls` of `values`, each checked against its field's type and rules.

    A field's metadata may hold `low` and `high` (inclusive), `above` (exclusive) and `choices`.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """
    by_name = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _check_value(f"{section}.{name}", cls, by_name[name], v) for name, v in values.items()})


def _check_value(key: str, cls: type[Any], setting: Field[Any], value: Any) -> Any:
    kind, optional = kind_of(cls, setting.name)
    if optional and (value is None or (kind is not str and value == _AUTO)):
        return None
    if is_pairs(kind):
        return _check_pairs(key, cls, setting, value)
    if is_texts(kind):
        return _check_texts(key, cls, setting, value)
    if kind is float and type(value) is int:
        value = as_float(value)
    if type(value) is not kind:
        raise ConfigError(_wrong_type(key, cls, setting.name, value))
    rules = setting.metadata
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{key} is {shown(value)}, it must be one of {', '.join(map(str, rules['choices']))}")
    if kind is str:
        _check_characters(key, value, is_path="is_path" in rules)
    if kind in (int, float):
        _check_range(key, value, rules)
    return value


def _check_characters(key: str, text: str, *, is_path: bool) -> None:
    """Refuse texts that are none, and those that nobody could use; a path may have bytes that are not UTF-8."""
    if not text.strip():
        raise ConfigError(f"{key} is empty")
    try:
        text.encode(errors="surrogateescape" if is_path else "strict")
    except UnicodeEncodeError:
        raise ConfigError(f"{key} is {shown(text)}, which is not valid Unicode") from None
    if "\0" in text:
        raise ConfigError(f"{key} is {shown(text)}, which has a zero byte")


def _check_pairs(key: str, cls: type[Any], setting: Field[Any], value: Any) -> dict[str, Any]:
    pairs = normal_pairs(kind_of(cls, setting.name)[0], value)
    if pairs is None:
        raise ConfigError(_wrong_type(key, cls, setting.name, value))
    for name, amount in pairs.items():
        if isinstance(amount, float):
            _check_range(f"{key}.{name}", amount, setting.metadata)
        else:
            _check_characters(f"{key}.{name}", amount, is_path=False)
        _check_characters(f"a name in {key}", name, is_path=False)
    return pairs


def _check_texts(key: str, cls: type[Any], setting: Field[Any], value: Any) -> tuple[str, ...]:
    texts = normal_texts([value] if isinstance(value, str) else value)
    if texts is None:
        raise ConfigError(_wrong_type(key, cls, setting.name, value))
    for text in texts:
        _check_characters(key, text, is_path=False)
    return texts


def _check_range(key: str, value: float, rules: Mapping[str, Any]) -> None:
    low, high, above = rules.get("low", -math.inf), rules.get("high", math.inf), rules.get("above", -math.inf)
    if low <= value <= high and value > above and math.isfinite(value):
        return
    limits = [f"at least {low}"] if "low" in rules else []
    limits += [f"at most {high}"] if "high" in rules else []
    limits += [f"more than {above}"] if "above" in rules else []
    raise ConfigError(f"{key} is {shown(value)}, it must be {' and '.join(limits) or 'finite'}")


def kind_of(cls: type[Any], name: str) -> tuple[type[Any], bool]:
    """A field's type, and whether None is a value of it."""
    hint = get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], True
    return hint, False


def _wrong_type(key: str, cls: type[Any], name: str, value: object) -> str:
    kind, optional = kind_of(cls, name)
    hint = " (put it in quotes)" if kind is str and isinstance(value, int | float) else ""
    what = describe_pairs(kind) if is_pairs(kind) else "a list of texts" if is_texts(kind) else _TYPE_NAMES[kind]
    secret = next(f for f in fields(cls) if f.name == name).metadata.get("secret")
    given = "something that is not shown" if secret else shown(value)
    return f"{key} is {given}, it must be {what}{' or null' if optional else ''}{hint}"
