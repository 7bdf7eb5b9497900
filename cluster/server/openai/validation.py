"""What a client is told of a body that is not as a request has to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from cluster.server.openai.errors import Answer, Kind

_KIND = "invalid_request_error"
_LONGEST = 80


def validation_answer(error: RequestValidationError) -> Answer:
    """The first thing that is wrong, with the field's name and its value: 400, where FastAPI would say 422."""
    first: dict[str, Any] = error.errors()[0]
    param = _name(first.get("loc", ()))
    kind = first.get("type", "")
    if kind == "json_invalid":
        reason = f"the body is no valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return Answer(Kind(400, _KIND, "invalid_json"), reason)
    if not param:
        reason = "the body must be a JSON object, sent as application/json"
        return Answer(Kind(415, _KIND, "unsupported_media_type"), reason)
    message = str(first.get("msg", "it is wrong")).removeprefix("Value error, ")
    if kind == "missing":
        return Answer(Kind(400, _KIND, "missing_required_parameter"), f"{param} is missing", param)
    shown = _shown(first.get("input"))
    return Answer(Kind(400, _KIND, "invalid_value"), f"{param} is {shown}: {message[:1].lower()}{message[1:]}", param)


def _name(loc: Sequence[Any]) -> str:
    """A field's path, such as messages[0].content; the names of types, which are in it too, are left out."""
    name = ""
    for part in loc[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in _TYPES and not part[:1].isupper():
            name += f".{part}" if name else part
    return name


_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict"})


def _shown(value: object) -> str:
    """A value on one line and not too long, whatever it is."""
    if isinstance(value, list | dict) and value:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**64:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
