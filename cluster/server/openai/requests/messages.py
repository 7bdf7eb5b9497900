"""Messages of a conversation, whose content is a text or a list of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.model import FirstError, RequestModel
from cluster.server.openai.requests.unsupported import supported_value
from cluster.text.tokenizer import ChatMessage
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
        InvalidRequestError: a message has no content.
    """
    return tuple(ChatMessage(message.role, _text(message, number)) for number, message in enumerate(messages))


def _text(message: Message, number: int) -> str:
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        supported_value(message.model_extra, name, "messages")
    if message.content is None:
        raise InvalidRequestError(f"messages[{number}] has no content")
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part(part, f"messages[{number}].content[{at}]") for at, part in enumerate(message.content))


def _part(part: ContentPart, where: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise UnsupportedFieldError("messages", f"{where} is of type {part.type!r}, and only text is supported")
    if part.text is None:
        raise InvalidRequestError(f"{where} has no text")
    return part.text
