"""Values as messages show them: cut, however large they are or would be when written out."""

from __future__ import annotations

import reprlib

_LONGEST = 200

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = _LONGEST
_short.maxlevel = 3


def shown(value: object) -> str:
    """A value as Python writes it, with dots for what is too much of it."""
    try:
        text = _short.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes out
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
