"""Tools as /v1/responses has them: without the inner object `function` that chats have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.conversation.json_values import as_object, text_of
from cluster.conversation.messages import Tool, ToolChoice, ToolChoiceMode, ToolUse
from cluster.conversation.read_tools import check_name, check_schema, tools_by
from cluster.server.openai.errors import UnsupportedFieldError
from workers.errors import InvalidRequestError

_MODES = {mode.value: mode for mode in (ToolChoiceMode.NONE, ToolChoiceMode.AUTO, ToolChoiceMode.REQUIRED)}


def response_tools(tools: object, tool_choice: object, parallel_tool_calls: bool | None) -> ToolUse | None:
    """The tools of a request and how they may be used; None where there are none.

    Args:
        tools: a list of `{"type": "function", "name": …, "parameters": …}`.
        tool_choice: "none", "auto", "required" or `{"type": "function", "name": …}`; None is auto.
        parallel_tool_calls: whether an answer may have several calls; None is true.

    Raises:
        InvalidRequestError: a value is wrong, or the choice needs tools that are not there.
        UnsupportedFieldError: a tool is no function, or the choice is of another kind.
    """
    return tools_by(_tool, tools, _choice(tool_choice), tool_choice, parallel_tool_calls is not False)


def _tool(value: object, where: str) -> Tool:
    tool = as_object(value, where)
    if tool.get("type") != "function":
        raise UnsupportedFieldError(
            "tools", f"{where} is of type {tool.get('type')!r:.100}, and only 'function' is supported"
        )
    strict = tool.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError(f"{where}.strict is {strict!r:.100}, it must be true or false")
    return Tool(
        name=check_name(tool.get("name"), f"{where}.name"),
        description=text_of(tool, "description", where),
        parameters=check_schema(tool.get("parameters"), f"{where}.parameters"),
        strict=strict,
    )


def _choice(value: object) -> ToolChoice:
    if value is None:
        return ToolChoice(ToolChoiceMode.AUTO)
    if isinstance(value, str) and value in _MODES:
        return ToolChoice(_MODES[value])
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"tool_choice is {value!r:.200}, it must be 'none', 'auto', 'required' or "
            '{"type": "function", "name": …}'
        )
    kind: Any = value.get("type")
    if kind != "function":
        raise UnsupportedFieldError(
            "tool_choice", f"tool_choice is of type {kind!r:.100}, and only 'function' is supported"
        )
    return ToolChoice(ToolChoiceMode.NAMED, check_name(value.get("name"), "tool_choice.name"))
