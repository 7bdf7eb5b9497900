"""Messages as OpenAI's interface has them: JSON values, checked and made into Baton's own types."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cluster.conversation.json_reader import is_json
from cluster.conversation.json_values import as_list, as_object, kind, text_of
from cluster.conversation.messages import MAX_MESSAGES, ChatMessage, ToolCall
from workers.errors import InvalidRequestError

MAX_CALLS = 128
MAX_ROLE = 64
MAX_ID = 256


def read_messages(value: object, where: str = "messages") -> tuple[ChatMessage, ...]:
    """The messages of a request.

    Raises:
        InvalidRequestError: one is wrong; the text names where it stands.
    """
    messages = as_list(value, where, "messages", MAX_MESSAGES)
    return tuple(read_message(message, f"{where}[{i}]") for i, message in enumerate(messages))


def read_message(value: object, where: str = "message") -> ChatMessage:
    """One message. Errors as in `read_messages`."""
    message = as_object(value, where)
    role = text_of(message, "role", where, MAX_ROLE)
    if not role:
        raise InvalidRequestError(f"{where}.role is missing")
    if message.get("function_call") is not None:
        raise InvalidRequestError(f"{where}.function_call is not supported; use tool_calls")
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise InvalidRequestError(f"{where}.tool_calls is set in a message of role {role!r}: an assistant makes calls")
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequestError(f"{where}.content is missing")
    return ChatMessage(
        role=role,
        content=read_content(content, f"{where}.content"),
        tool_calls=_calls(calls, f"{where}.tool_calls"),
        tool_call_id=text_of(message, "tool_call_id", where, MAX_ID),
        name=text_of(message, "name", where, MAX_ID),
        reasoning_content=text_of(message, "reasoning_content", where) or text_of(message, "reasoning", where),
    )


def read_content(value: object, where: str = "content") -> str:
    """What a message says: a text, or the texts of a list of parts, one a line. Errors as in `read_messages`."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    texts = []
    for i, each in enumerate(as_list(value, where, "parts, or a text")):
        part = as_object(each, f"{where}[{i}]")
        if part.get("type") != "text":
            raise InvalidRequestError(
                f"{where}[{i}] is of type {part.get('type')!r}; only parts of type 'text' are supported"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}[{i}].text is {kind(part.get('text'))}, it must be a text")
        texts.append(part["text"])
    return "\n".join(texts)


def check_arguments(value: object, where: str) -> str:
    """A call's arguments, as text. Errors as in `read_messages`."""
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    if value in (None, ""):
        return "{}"
    text = value.strip(" \t\r\n") if isinstance(value, str) else ""
    if not text.startswith("{") or not is_json(text):
        raise InvalidRequestError(f"{where} is {value!r:.100}, it must be a JSON object as text")
    return text


def _calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    return tuple(_call(call, f"{where}[{i}]") for i, call in enumerate(as_list(value, where, "calls", MAX_CALLS)))


def _call(value: object, where: str) -> ToolCall:
    call = as_object(value, where)
    if call.get("type", "function") != "function":
        raise InvalidRequestError(f"{where}.type is {call['type']!r:.100}; only 'function' is supported")
    function = as_object(call.get("function"), f"{where}.function")
    name = text_of(function, "name", f"{where}.function", MAX_ID)
    if not name:
        raise InvalidRequestError(f"{where}.function.name is missing")
    arguments = check_arguments(function.get("arguments"), f"{where}.function.arguments")
    return ToolCall(text_of(call, "id", where, MAX_ID), name, arguments)
