"""Server-sent events as OpenAI's clients read them (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from typing import Any

from cluster.server.openai.json_bytes import json_bytes

DONE = b"data: [DONE]\n\n"
"""The last event of a stream of completions."""


def event(data: dict[str, Any]) -> bytes:
    """One event without a name."""
    return b"data: " + json_bytes(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """One event that is named as its `type`."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)
