"""The client's name for a request, and other words of a client, as they may stand in a log."""

from __future__ import annotations

from workers.errors import InvalidRequestError

MAX_LENGTH = 128
MAX_LOGGED_ERROR = 2000
"""Characters of an error, which may repeat what a client has sent."""
MAX_NAME_BYTES = 128


def check_name(field: str, text: str) -> str:
    """A name that a client gives, of a request or of itself.

    Raises:
        InvalidRequestError: it has more than `MAX_NAME_BYTES`.
    """
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_NAME_BYTES:
        raise InvalidRequestError(f"{field} has {size} bytes, at most {MAX_NAME_BYTES} are allowed")
    return text


def clean_request_id(given: str) -> str:
    """A request's name on one line and of at most `MAX_LENGTH` characters.

    What is not printable (control characters, line and paragraph separators, lone surrogates) is written as an escape,
    so that no client can write lines of its own into a log; what is too long is cut.
    """
    return one_line(given, MAX_LENGTH)


def one_line(text: str, longest: int) -> str:
    """A text on one line, as `clean_request_id` has a name."""
    cut = text[:longest]
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)[:longest]
