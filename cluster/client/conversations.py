"""Conversations as clients write them, put on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from protos import baton_pb2
from workers.errors import InvalidRequestError

Messages = Sequence[tuple[str, str] | Mapping[str, Any]]
"""Messages, oldest first: {"role": "user", "content": "…"} each, as in OpenAI's API, or (role, content).

A content may be a list of text parts, {"type": "text", "text": "…"} each, which become its lines.
"""

_FIELDS = ("role", "content")


def chat_to_proto(messages: Messages) -> baton_pb2.ChatMessages:
    """A conversation as the wire has it.

    Raises:
        InvalidRequestError: something is no message; names its place and value.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequestError(f"chat is {_shown(messages)}, expected a list of messages")
    return baton_pb2.ChatMessages(messages=[_message(place, message) for place, message in enumerate(messages)])


def _message(place: int, message: Any) -> baton_pb2.ChatMessage:
    what = f"chat message {place}"
    if isinstance(message, Mapping):
        unknown = [name for name in message if name not in _FIELDS and message[name] is not None]
        missing = [name for name in _FIELDS if message.get(name) is None]
        if unknown or missing:
            problem = f"has {unknown[0]!r}, which cannot be sent" if unknown else f"has no {missing[0]!r}"
            raise InvalidRequestError(f"{what} {problem}: {_shown(message)}")
        role, content = message["role"], message["content"]
    elif isinstance(message, list | tuple) and len(message) == len(_FIELDS):
        role, content = message
    else:
        raise InvalidRequestError(f"{what} is {_shown(message)}, expected role and content")
    if not isinstance(role, str):
        raise InvalidRequestError(f"the role of {what} is {_shown(role)}, expected text")
    return baton_pb2.ChatMessage(role=role, content=_content(what, content))


def _content(what: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"the content of {what} is {_shown(content)}, expected text")
    lines = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequestError(f"the content of {what} has {_shown(part)}, expected parts of text")
        lines.append(text)
    return "\n".join(lines)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
