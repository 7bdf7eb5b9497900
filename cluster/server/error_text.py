"""What a client is told of an error, by every door."""

from __future__ import annotations

MAX_CHARACTERS = 2000
"""gRPC sends it as a header, of which few kilobytes are taken; and it may repeat what the client has sent."""


def error_text(error: BaseException) -> str:
    """The error's own words, cut where they are too many; the name of its type if it has none."""
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
