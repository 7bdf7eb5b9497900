"""The input of /v1/responses: messages, calls that the model has made, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from cluster.conversation.messages import ChatMessage, ToolCall
from cluster.conversation.read_messages import MAX_CALLS, MAX_ID, check_arguments
from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.messages import ContentPart, Message, chat_messages, content_text
from cluster.server.openai.requests.model import FirstError
from workers.errors import InvalidRequestError


class InputItem(Message):
    """An item of the input, by its `type`: a message, a `function_call`, or its result, a `function_call_output`."""

    type: str | None = None
    role: str = Field("", max_length=128)
    call_id: Annotated[str, Field(max_length=MAX_ID)] = ""
    name: Annotated[str, Field(max_length=MAX_ID)] = ""
    arguments: str | None = None
    output: str | Annotated[list[ContentPart], FirstError()] | None = None


def input_messages(items: Sequence[InputItem]) -> tuple[ChatMessage, ...]:
    """The conversation that the items are; calls belong to the assistant's message before them.

    Raises:
        InvalidRequestError: an item is wrong.
        UnsupportedFieldError: an item is of another kind.
    """
    messages: list[ChatMessage] = []
    for number, item in enumerate(items):
        where = f"input[{number}]"
        if item.type == "function_call":
            _add_call(messages, _call(item, where), where)
        elif item.type == "function_call_output":
            messages.append(ChatMessage("tool", _output(item, where), tool_call_id=_call_id(item, where)))
        elif item.type not in (None, "message"):
            raise UnsupportedFieldError("input", f"{where} is of type {item.type!r:.100}, which is not supported")
        elif not item.role:
            raise InvalidRequestError(f"{where} has no role")
        else:
            messages += chat_messages([Message(role=item.role, content=item.content)], "input", number)
    return tuple(messages)


def _add_call(messages: list[ChatMessage], call: ToolCall, where: str) -> None:
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage("assistant"))
    calls = messages[-1].tool_calls
    if len(calls) == MAX_CALLS:
        raise InvalidRequestError(f"{where} is one call more than the {MAX_CALLS} that an answer may have")
    messages[-1] = replace(messages[-1], tool_calls=(*calls, call))


def _call(item: InputItem, where: str) -> ToolCall:
    if not item.name:
        raise InvalidRequestError(f"{where} has no name")
    return ToolCall(_call_id(item, where), item.name, check_arguments(item.arguments, f"{where}.arguments"))


def _call_id(item: InputItem, where: str) -> str:
    if not item.call_id:
        raise InvalidRequestError(f"{where} has no call_id")
    return item.call_id


def _output(item: InputItem, where: str) -> str:
    if item.output is None:
        raise InvalidRequestError(f"{where} has no output")
    return content_text(item.output, f"{where}.output", "input")
