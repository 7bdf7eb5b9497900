"""How much a JSON body may have, found out before it is parsed: an empty object takes hundreds of bytes afterwards."""

from __future__ import annotations

import numpy as np

from workers.errors import InvalidRequestError

MAX_VALUES = 2**21
"""Numbers, texts and so on in one body; prompts are given as token ids, too."""
MAX_CONTAINERS = 2**16
"""Lists and objects in one body."""
SMALL_BYTES = 2**16
"""A body up to this size cannot have too much of anything; what it has is counted when it is read."""


def check_json_bounds(body: bytes, window: int = 2**20) -> None:
    """Refuse a body that has too many values. One that is no JSON may pass: who parses it will say so.

    Args:
        body: as it came.
        window: bytes that are looked at together.

    Raises:
        InvalidRequestError: names how many there are, and the bound.
    """
    if len(body) <= SMALL_BYTES or _few(*_marks(body)):
        return
    values, containers = _marks_outside_texts(body, window)
    if containers > MAX_CONTAINERS:
        raise InvalidRequestError(f"the body has {containers} lists and objects, at most {MAX_CONTAINERS} are allowed")
    if values > MAX_VALUES:
        raise InvalidRequestError(f"the body has {values} values, at most {MAX_VALUES} are allowed")


def _few(values: int, containers: int) -> bool:
    return values <= MAX_VALUES and containers <= MAX_CONTAINERS


def _marks(part: bytes) -> tuple[int, int]:
    """Values, which end with a comma but for the last of each container, and containers: if there were no texts."""
    containers = part.count(b"{") + part.count(b"[")
    return part.count(b",") + containers, containers


def _marks_outside_texts(body: bytes, size: int) -> tuple[int, int]:
    """The same of what is not in texts, which begin and end with a quote that no backslash stands before."""
    plain = np.frombuffer(body.replace(rb"\\", b"  ").replace(rb"\"", b"  "), np.uint8)
    values = containers = 0
    inside = 0
    for start in range(0, len(plain), size):
        window = plain[start : start + size]
        # Odd behind an odd number of quotes; that the sum wraps does not change it.
        odd = (np.cumsum(window == ord('"'), dtype=np.uint8) + np.uint8(inside)) & 1
        found = _marks(window[odd == 0].tobytes())
        values, containers, inside = values + found[0], containers + found[1], int(odd[-1])
    return values, containers
