"""Tools as OpenAI's interface has them: JSON values, checked and made into Baton's own types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.conversation.json_reader import MAX_DEPTH, is_deeper
from cluster.conversation.json_values import as_list, as_object, kind, text_of
from cluster.conversation.messages import Tool, ToolChoice, ToolChoiceMode, ToolUse
from workers.errors import InvalidRequestError

MAX_TOOLS = 128
MAX_TOOL_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MODES = (ToolChoiceMode.NONE, ToolChoiceMode.AUTO, ToolChoiceMode.REQUIRED)


def read_tool_use(tools: object, tool_choice: object = None, parallel_tool_calls: object = None) -> ToolUse | None:
    """The tools of a request and how they may be used; None where there are none.

    Args:
        tools: a list of `{"type": "function", "function": {…}}`.
        tool_choice: "none", "auto", "required" or `{"type": "function", "function": {"name": …}}`; None is auto.
        parallel_tool_calls: whether an answer may have several calls; None is true.

    Raises:
        InvalidRequestError: a value is wrong, or the choice needs tools that are not there.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InvalidRequestError(f"parallel_tool_calls is {kind(parallel_tool_calls)}, it must be true or false")
    return tools_by(read_tool, tools, _choice(tool_choice), tool_choice, parallel_tool_calls is not False)


def tools_by(
    read: Callable[[object, str], Tool], tools: object, choice: ToolChoice, asked: object, parallel: bool
) -> ToolUse | None:
    """The tools of a request, each read by `read`, and how they may be used; None where there are none.

    Args:
        read: a tool, and its place in the request, to what it is.
        tools: a list.
        choice: read already.
        asked: what it was read from, for the message.
        parallel: whether an answer may have several calls.

    Raises:
        InvalidRequestError: a value is wrong, or the choice needs tools that are not there.
    """
    if tools is None or tools == []:
        if choice.mode in (ToolChoiceMode.REQUIRED, ToolChoiceMode.NAMED):
            raise InvalidRequestError(f"tool_choice is {asked!r:.200}, but the request has no tools")
        return None
    given = as_list(tools, "tools", "tools", MAX_TOOLS)
    return tool_use([read(tool, f"tools[{number}]") for number, tool in enumerate(given)], choice, parallel)


def tool_use(tools: Sequence[Tool], choice: ToolChoice, parallel: bool) -> ToolUse:
    """Tools and choice, checked together.

    Raises:
        InvalidRequestError: two tools have one name, or the choice names none of them, or they are too large.
    """
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequestError(f"two tools are called {twice!r}")
    if choice.mode is ToolChoiceMode.NAMED and choice.name not in names:
        raise InvalidRequestError(f"tool_choice names {choice.name!r}, but the tools are {', '.join(names)}")
    size = sum(len(json.dumps(tool.parameters)) + len(tool.description) for tool in tools)
    if size > MAX_TOOL_BYTES:
        raise InvalidRequestError(f"the tools take {size} bytes, at most {MAX_TOOL_BYTES} are allowed")
    return ToolUse(tuple(tools), choice, parallel, size)


def read_tool(value: object, where: str = "tool") -> Tool:
    """One tool. Errors as in `read_messages`."""
    tool = as_object(value, where)
    if tool.get("type", "function") != "function":
        raise InvalidRequestError(f"{where}.type is {tool['type']!r:.100}; only 'function' is supported")
    function = as_object(tool.get("function"), f"{where}.function")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError(f"{where}.function.strict is {kind(strict)}, it must be true or false")
    return Tool(
        name=check_name(function.get("name"), f"{where}.function.name"),
        description=text_of(function, "description", f"{where}.function"),
        parameters=check_schema(function.get("parameters"), f"{where}.function.parameters"),
        strict=strict,
    )


def check_name(value: object, where: str) -> str:
    """A function's name. Errors as in `read_messages`."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequestError(
            f"{where} is {value!r:.100}, it must be 1 to 64 letters, digits, underscores, dashes and dots"
        )
    return value


def check_schema(value: object, where: str) -> Mapping[str, Any] | None:
    """A function's parameters, a JSON schema of an object. Errors as in `read_messages`."""
    if value is None:
        return None
    schema = as_object(value, where)
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(f"{where}.type is {schema['type']!r:.100}, it must be 'object'")
    if is_deeper(schema, MAX_DEPTH):
        raise InvalidRequestError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return schema


def _choice(value: object) -> ToolChoice:
    if value is None:
        return ToolChoice(ToolChoiceMode.AUTO)
    for mode in _MODES:
        if value == mode.value:
            return ToolChoice(mode)
    if isinstance(value, Mapping) and value.get("type") == "function":
        function = as_object(value.get("function"), "tool_choice.function")
        return ToolChoice(ToolChoiceMode.NAMED, check_name(function.get("name"), "tool_choice.function.name"))
    raise InvalidRequestError(
        f"tool_choice is {value!r:.200}, it must be 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": …}}'
    )
