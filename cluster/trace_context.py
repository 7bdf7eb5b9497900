"""The trace that a call belongs to, between the door that it comes through and where its request is made.

W3C's Trace Context (https://www.w3.org/TR/trace-context/) has it in a header `traceparent`, of HTTP and of gRPC alike:
`00-<32 hex digits: the trace>-<16: the caller's span>-<2: flags>`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar

HEADER = "traceparent"
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str] = ContextVar("traceparent", default="")


def accept(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Take the trace of a call from its headers, for what the running task does from now on.

    A door calls this first; what is no valid `traceparent`, or given twice, counts as none, as the standard has it.

    Args:
        headers: names in lower case, and values.
    """
    given = [value for name, value in headers if name == HEADER]
    only = given[0] if len(given) == 1 else ""
    text = only.decode("latin-1") if isinstance(only, bytes) else only
    _current.set(text if _FORM.fullmatch(text) else "")


def get() -> str:
    """The `traceparent` of the call that the running task answers; empty: it has none."""
    return _current.get()


def outgoing() -> list[tuple[str, str]]:
    """The header of a call that is made now, if this program uses OpenTelemetry and is in a span of its own."""
    if "opentelemetry" not in sys.modules:
        return []
    from opentelemetry.propagate import inject

    headers: dict[str, str] = {}
    inject(headers)
    return [(name, value) for name, value in headers.items() if name == HEADER]
