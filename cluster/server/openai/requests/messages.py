"""Messages of a conversation, whose content is a text or a list of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cluster.conversation.messages import ChatMessage
from cluster.conversation.read_messages import read_message
from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.model import FirstError, RequestModel
from cluster.server.openai.requests.unsupported import supported_value
from workers.errors import InvalidRequestError

_TEXT_PARTS = ("text", "input_text", "output_text")


class ContentPart(RequestModel):
    """A part of a message's content; only text is supported."""

    type: str
    text: str | None = None


class Message(RequestModel):
    """One message."""

    role: str = Field(min_length=1, max_length=128)
    content: str | Annotated[list[ContentPart], FirstError()] | None = None


Messages = Annotated[list[Message], FirstError()]


def chat_messages(messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
    """The messages as the checkpoint's template gets them; text in several parts has a line for each, as in vLLM.

    Raises:
        UnsupportedFieldError: a message has something besides text.
        InvalidRequestError: a message has no content, or one of its other fields is wrong.
    """
    return tuple(_message(message, number) for number, message in enumerate(messages))


def _message(message: Message, number: int) -> ChatMessage:
    for name in ("function_call", "audio"):
        supported_value(message.model_extra, name, "messages")
    whole = {**(message.model_extra or {}), "role": message.role, "content": _text(message, number)}
    return read_message(whole, f"messages[{number}]")


def _text(message: Message, number: int) -> str | None:
    if message.content is None:
        if not (message.model_extra or {}).get("tool_calls"):
            raise InvalidRequestError(f"messages[{number}] has no content")
        return None
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part(part, f"messages[{number}].content[{at}]") for at, part in enumerate(message.content))


def _part(part: ContentPart, where: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise UnsupportedFieldError("messages", f"{where} is of type {part.type!r}, and only text is supported")
    if part.text is None:
        raise InvalidRequestError(f"{where} has no text")
    return part.text
