"""JSON schemas made at random, all of whose answers are short: what structured output is measured and tested with."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("name", "age", "city", "tags", "score", "active", "id", "kind", "items", "note", "größe", "x y", 'a"b')
_PATTERNS = ("^[a-z]{2,5}$", "^[A-Z]{3}-[0-9]{2}$", "^(red|green|blue)$", "^\\d{4}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


def made_schema(seed: int, depth: int = 3) -> Schema:
    """An object's schema: properties of all types, some optional, nested so deep, with references and alternatives."""
    rng = random.Random(seed)
    schema = _object(rng, depth)
    if rng.random() < 0.3:
        schema["$defs"] = {"part": _object(rng, 1)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _pattern, _format, _integer, _number, _enum, _const, _plain)
    nested: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _array, _any_of)
    if depth > 0 and rng.random() < 0.5:
        return rng.choice(nested)(rng, depth - 1)
    return rng.choice(leaves)(rng)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(2)]}


def _string(rng: random.Random) -> Schema:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _pattern(rng: random.Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _integer(rng: random.Random) -> Schema:
    least = rng.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}


def _number(rng: random.Random) -> Schema:
    least = round(rng.uniform(-5, 5), 2)
    return {"type": "number", "minimum": least, "maximum": round(least + rng.uniform(0.1, 10), 2)}


def _enum(rng: random.Random) -> Schema:
    return {"enum": rng.sample(["a", "b", 1, 2.5, None, True, "long value"], rng.randint(1, 4))}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice(["fixed", 7, None, False])}


def _plain(rng: random.Random) -> Schema:
    return {"type": rng.choice(["boolean", "null"])}
