"""Messages and tools as chat templates are given them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from cluster.conversation.messages import ChatMessage, Tool

_ANY_OBJECT: dict[str, Any] = {"type": "object", "properties": {}}


class Arguments(dict[str, Any]):
    """A call's arguments as templates take them apart: an object, or as those write them that expect text.

    Some templates go through the arguments or write them with `tojson`, others join them to text. This is the object,
    and in a concatenation it is the text as the model wrote it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text))
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def template_messages(
    messages: Sequence[ChatMessage],
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = lambda message: message,
    *,
    knows_developer: bool = False,
) -> list[dict[str, Any]]:
    """Messages as `transformers`' `apply_chat_template` takes them.

    Args:
        messages: of the conversation.
        adapt: of the model's tool format.
        knows_developer: whether the template has the role "developer"; where it does not, that is "system".
    """
    return [adapt(_message(message, knows_developer)) for message in messages]


def _message(message: ChatMessage, knows_developer: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" and not knows_developer else message.role
    given: dict[str, Any] = {"role": role, "content": message.content}
    if message.tool_calls:
        # Templates tell by None, not by an empty text, that there is nothing but calls.
        given["content"] = message.content or None
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": Arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if value := getattr(message, key):
            given[key] = value
    return given


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tools as `transformers`' `apply_chat_template` takes them; None where there are none."""
    return [_tool(tool) for tool in tools] or None


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = _ANY_OBJECT if tool.parameters is None else dict(tool.parameters)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }
