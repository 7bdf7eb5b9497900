"""The trace that a call belongs to, between the door that it comes through and where its request is made.

W3C's Trace Context (https://www.w3.org/TR/trace-context/) has it in two headers, of HTTP and of gRPC alike:
`traceparent`, `00-<32 hex digits: the trace>-<16: the caller's span>-<2: flags>`, and `tracestate`, a list of
`key=value` in which tracing systems keep what is their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from typing import NamedTuple

PARENT = "traceparent"
STATE = "tracestate"
_PARENT_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_KEY = r"(?:[a-z][_0-9a-z*/-]{0,255}|[a-z0-9][_0-9a-z*/-]{0,240}@[a-z][_0-9a-z*/-]{0,13})"
_MEMBER_FORM = re.compile(rf"({_KEY})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_MOST_MEMBERS = 32
_MOST_STATE = 512
_LONG_MEMBER = 128


class TraceContext(NamedTuple):
    """A call's trace, as its headers have it; both are empty where it has none."""

    parent: str = ""
    state: str = ""


_NONE = TraceContext()
_current: ContextVar[TraceContext] = ContextVar("trace_context", default=_NONE)


def accept(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Take the trace of a call from its headers, for what the running task does from now on.

    A door calls this first; what is no valid `traceparent`, or given twice, counts as none, as the standard has it. A
    `tracestate` may be in several headers; one that is no valid list is dropped, and the trace goes on without it.

    Args:
        headers: names in lower case, and values.
    """
    parents: list[str] = []
    states: list[str] = []
    for name, value in headers:
        if name in (PARENT, STATE):
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            (parents if name == PARENT else states).append(text)
    if len(parents) != 1 or not _PARENT_FORM.fullmatch(parents[0]):
        _current.set(_NONE)
    else:
        _current.set(TraceContext(parents[0], _checked(states)))


def get() -> TraceContext:
    """The trace of the call that the running task answers."""
    return _current.get()


def outgoing() -> list[tuple[str, str]]:
    """The headers of a call that is made now, if this program uses OpenTelemetry and is in a span of its own."""
    if "opentelemetry" not in sys.modules:
        return []
    from opentelemetry.propagate import inject

    headers: dict[str, str] = {}
    inject(headers)
    return [(name, value) for name, value in headers.items() if name in (PARENT, STATE)]


def _checked(states: list[str]) -> str:
    """The list as it is handed on: at most 512 characters, for which long members go first, then the last ones."""
    members = [member for state in states for part in state.split(",") if (member := part.strip(" \t"))]
    found = [_MEMBER_FORM.fullmatch(member) for member in members]
    keys = {match[1] for match in found if match}
    if len(keys) != len(members) or len(members) > _MOST_MEMBERS:
        return ""
    if len(",".join(members)) > _MOST_STATE:
        members = [member for member in members if len(member) <= _LONG_MEMBER]
    while len(",".join(members)) > _MOST_STATE:
        members.pop()
    return ",".join(members)
