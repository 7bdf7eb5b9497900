"""Conversations as clients write them, put on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from cluster.conversation.messages import ChatMessage
from cluster.conversation.read_messages import read_message
from cluster.conversation.read_tools import read_tool_use
from cluster.wire.chat import messages_to_proto, tool_use_to_proto
from protos import baton_pb2
from workers.errors import InvalidRequestError

Messages = Sequence[tuple[str, str] | Mapping[str, Any] | ChatMessage]
"""Messages, oldest first: {"role": "user", "content": "…"} each, as in OpenAI's API, or (role, content), or an answer.

A content may be a list of text parts, {"type": "text", "text": "…"} each, which become its lines. An assistant's
message may have `tool_calls`, a tool's has `tool_call_id`, as in OpenAI's API.
"""

_FIELDS = ("role", "content")
_OPTIONAL = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning")


class ConversationOptions(TypedDict, total=False):
    """What a client may say of a conversation beside its messages; None is as if a field were not given.

    Attributes:
        tools: functions that the model may call, {"type": "function", "function": {"name": …, "parameters": …}} each,
            as in OpenAI's API.
        tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": …}}.
        parallel_tool_calls: whether an answer may have several calls; it may by default.
        chat_template_kwargs: more that the chat template may look at, such as {"enable_thinking": False}.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


def chat_to_proto(messages: Messages, options: ConversationOptions | None = None) -> baton_pb2.ChatMessages:
    """A conversation as the wire has it.

    Raises:
        InvalidRequestError: something is no message or no tool; names its place and value.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequestError(f"chat is {_shown(messages)}, expected a list of messages")
    given = options or {}
    use = read_tool_use(given.get("tools"), given.get("tool_choice"), given.get("parallel_tool_calls"))
    chat = baton_pb2.ChatMessages(
        messages=messages_to_proto(_message(place, message) for place, message in enumerate(messages)),
        **({} if use is None else tool_use_to_proto(use)),
    )
    if variables := given.get("chat_template_kwargs"):
        chat.chat_template_kwargs.update(variables)
    return chat


def _message(place: int, message: Any) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    what = f"chat message {place}"
    if isinstance(message, Mapping):
        given = {name: value for name, value in message.items() if value is not None}
        unknown = [name for name in given if name not in _FIELDS and name not in _OPTIONAL]
        missing = [name for name in _FIELDS if name not in given]
        if given.get("tool_calls") and missing == ["content"]:
            missing = []
        if unknown or missing:
            problem = f"has {unknown[0]!r}, which cannot be sent" if unknown else f"has no {missing[0]!r}"
            raise InvalidRequestError(f"{what} {problem}: {_shown(message)}")
    elif isinstance(message, list | tuple) and len(message) == len(_FIELDS):
        given = dict(zip(_FIELDS, message, strict=True))
    else:
        raise InvalidRequestError(f"{what} is {_shown(message)}, expected role and content")
    if not isinstance(given["role"], str):
        raise InvalidRequestError(f"the role of {what} is {_shown(given['role'])}, expected text")
    if "content" in given:
        given["content"] = _content(what, given["content"])
    return read_message(given, what)


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
