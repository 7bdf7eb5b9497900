"""Messages of a conversation, whose content is a text or a list of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cluster.conversation.messages import MAX_MESSAGES, ChatMessage
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


Messages = Annotated[list[Message], FirstError(), Field(max_length=MAX_MESSAGES)]


def chat_messages(messages: Sequence[Message], field: str = "messages", first: int = 0) -> tuple[ChatMessage, ...]:
    """The messages as the checkpoint's template gets them; text in several parts has a line for each, as in vLLM.

    Args:
        messages: as they were sent.
        field: of the request that they stand in.
        first: place of the first one there.

    Raises:
        UnsupportedFieldError: a message has something besides text.
        InvalidRequestError: a message has no content, or one of its other fields is wrong.
    """
    return tuple(_message(message, field, first + number) for number, message in enumerate(messages))


def check_number(messages: Sequence[Message], field: str) -> None:
    """Refuse more messages than a conversation may have.

    Raises:
        InvalidRequestError: with both numbers.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"{field} has {len(messages)} entries, at most {MAX_MESSAGES} are allowed")


def content_text(content: str | Sequence[ContentPart], where: str, field: str) -> str:
    """A content's text. Errors as in `chat_messages`, which name the place and the request's field."""
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{where}[{at}]", field) for at, part in enumerate(content))


def _message(message: Message, field: str, number: int) -> ChatMessage:
    for name in ("function_call", "audio"):
        supported_value(message.model_extra, name, field)
    whole = {**(message.model_extra or {}), "role": message.role, "content": _text(message, field, number)}
    return read_message(whole, f"{field}[{number}]")


def _text(message: Message, field: str, number: int) -> str | None:
    if message.content is None:
        if not (message.model_extra or {}).get("tool_calls"):
            raise InvalidRequestError(f"{field}[{number}] has no content")
        return None
    return content_text(message.content, f"{field}[{number}].content", field)


def _part(part: ContentPart, where: str, field: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise UnsupportedFieldError(field, f"{where} is of type {part.type!r}, and only text is supported")
    if part.text is None:
        raise InvalidRequestError(f"{where} has no text")
    return part.text
