"""Messages and tools as chat templates are given them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.messages import ChatMessage, Tool, ToolCall

Message = dict[str, Any]
Adapt = Callable[[Message], Message]
_ANY_OBJECT: dict[str, Any] = {"type": "object", "properties": {}}


def unchanged(message: Message) -> Message:
    """The message as it is."""
    return message


@dataclass(frozen=True)
class TemplateStyle:
    """What a chat template expects of an assistant's calls.

    Attributes:
        arguments_as_text: the arguments are the text that the model wrote, to be joined to other text; not an object.
        nothing_is_none: a message with nothing but calls has None for its content; not an empty text.
    """

    arguments_as_text: bool = False
    nothing_is_none: bool = False


_STYLES = tuple(TemplateStyle(text, none) for none in (False, True) for text in (False, True))
_PROBE_TOOL = Tool("probe", "probe", {"type": "object", "properties": {"probe_key": {"type": "string"}}})
_PROBE = (
    ChatMessage("user", "probe"),
    ChatMessage("assistant", tool_calls=(ToolCall("probe1234", "probe", '{"probe_key": "probe_value"}'),)),
    ChatMessage("tool", "probe", tool_call_id="probe1234", name="probe"),
)


def detect_style(
    render: Callable[[list[Message], list[Message] | None], str], adapt: Adapt = unchanged
) -> TemplateStyle:
    """What a template expects, found by having it write a call in every way: the first in which the call is there.

    Args:
        render: the template, given messages and tools; it may raise whatever it likes.
        adapt: of the model's tool format.
    """
    for style in _STYLES:
        try:
            rendered = render(template_messages(_PROBE, adapt, style), template_tools([_PROBE_TOOL]))
        except Exception:
            continue
        # A text that was written as JSON once more has its quotes escaped.
        if "probe_value" in rendered and '\\"probe_key' not in rendered:
            return style
    return TemplateStyle()


def template_messages(
    messages: Sequence[ChatMessage],
    adapt: Adapt = unchanged,
    style: TemplateStyle = TemplateStyle(),
    *,
    knows_developer: bool = False,
) -> list[Message]:
    """Messages as `transformers`' chat templates take them.

    Args:
        messages: of the conversation.
        adapt: of the model's tool format.
        style: of the template.
        knows_developer: whether the template has the role "developer"; where it does not, that is "system".
    """
    return [adapt(_message(message, style, knows_developer)) for message in messages]


def template_tools(tools: Sequence[Tool]) -> list[Message] | None:
    """Tools as `transformers`' chat templates take them; None where there are none."""
    return [_tool(tool) for tool in tools] or None


def with_tools_described(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], syntax: CallSyntax
) -> list[ChatMessage]:
    """The messages with the tools in the system's, for templates that take none.

    Args:
        messages: of the conversation.
        tools: that the model may call.
        syntax: how it calls them.
    """
    call = f"{syntax.begin}ARGUMENTS{syntax.end}".replace("{name}", "NAME")
    several = f"{syntax.section_begin}{call}{syntax.separator}{call}{syntax.section_end}"
    described = "\n\n".join(
        f"### {tool.name}\n{tool.description}\nParameters: {json.dumps(tool.parameters or _ANY_OBJECT)}"
        for tool in tools
    )
    text = (
        f"## Tools\nYou can call these functions:\n\n{described}\n\nTo call one, write exactly this, with the "
        f"function's name for NAME and a JSON object that its parameters allow for ARGUMENTS:\n"
        f"{syntax.section_begin}{call}{syntax.section_end}\n\nTo call several:\n{several}"
    )
    first, *rest = messages
    if first.role in ("system", "developer"):
        return [replace(first, content=f"{first.content}\n\n{text}"), *rest]
    return [ChatMessage("system", text), *messages]


def _message(message: ChatMessage, style: TemplateStyle, knows_developer: bool) -> Message:
    role = "system" if message.role == "developer" and not knows_developer else message.role
    given: Message = {"role": role, "content": message.content}
    if message.tool_calls:
        given["tool_calls"] = [_call(call, style) for call in message.tool_calls]
        if style.nothing_is_none and not message.content:
            given["content"] = None
    for key in ("tool_call_id", "name", "reasoning_content"):
        if value := getattr(message, key):
            given[key] = value
    return given


def _call(call: ToolCall, style: TemplateStyle) -> Message:
    arguments = call.arguments if style.arguments_as_text else json.loads(call.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: Tool) -> Message:
    parameters = _ANY_OBJECT if tool.parameters is None else dict(tool.parameters)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }
