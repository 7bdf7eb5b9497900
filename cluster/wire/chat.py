"""Conversations and their answers between the wire's messages and Baton's own types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.conversation.deltas import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallStarted
from cluster.conversation.messages import (
    MAX_MESSAGES,
    ChatMessage,
    Tool,
    ToolCall,
    ToolChoice,
    ToolChoiceMode,
    ToolUse,
)
from cluster.conversation.read_messages import MAX_CALLS, check_arguments
from cluster.conversation.read_tools import MAX_TOOL_BYTES, MAX_TOOLS, check_name, check_schema, tool_use
from protos import baton_pb2
from workers.errors import InvalidRequestError

_MODES = {
    ToolChoiceMode.AUTO: baton_pb2.TOOL_CHOICE_MODE_AUTO,
    ToolChoiceMode.NONE: baton_pb2.TOOL_CHOICE_MODE_NONE,
    ToolChoiceMode.REQUIRED: baton_pb2.TOOL_CHOICE_MODE_REQUIRED,
}
_MODES_BACK = {number: mode for mode, number in _MODES.items()}


def messages_to_proto(messages: Iterable[ChatMessage]) -> list[baton_pb2.ChatMessage]:
    """Messages of a conversation."""
    return [
        baton_pb2.ChatMessage(
            role=message.role,
            content=message.content,
            tool_calls=[
                baton_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
            ],
            tool_call_id=message.tool_call_id,
            name=message.name,
            reasoning=message.reasoning_content,
        )
        for message in messages
    ]


def messages_from_proto(messages: Sequence[baton_pb2.ChatMessage]) -> tuple[ChatMessage, ...]:
    """Messages of a conversation.

    Raises:
        InvalidRequestError: a call is wrong, or there are too many calls or messages.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has {len(messages)} entries, at most {MAX_MESSAGES} are allowed")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: baton_pb2.ChatMessage, where: str) -> ChatMessage:
    calls = message.tool_calls
    if calls and message.role != "assistant":
        raise InvalidRequestError(f"{where} of role {message.role!r} has tool_calls: an assistant makes calls")
    if len(calls) > MAX_CALLS:
        raise InvalidRequestError(f"{where}.tool_calls has {len(calls)} entries, at most {MAX_CALLS} are allowed")
    return ChatMessage(
        role=message.role,
        content=message.content,
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)),
        tool_call_id=message.tool_call_id,
        name=message.name,
        reasoning_content=message.reasoning,
    )


def _call(call: baton_pb2.ToolCall, where: str) -> ToolCall:
    if not call.name:
        raise InvalidRequestError(f"{where}.name is missing")
    return ToolCall(call.id, call.name, check_arguments(call.arguments, f"{where}.arguments"))


def tool_use_to_proto(use: ToolUse) -> dict[str, Any]:
    """The fields of `ChatMessages` about tools."""
    choice = use.choice
    named = choice.mode is ToolChoiceMode.NAMED
    return {
        "tools": [
            baton_pb2.Tool(
                name=tool.name,
                description=tool.description,
                parameters="" if tool.parameters is None else json.dumps(tool.parameters),
            )
            for tool in use.tools
        ],
        "tool_choice": baton_pb2.ToolChoice(function=choice.name)
        if named
        else baton_pb2.ToolChoice(mode=_MODES[choice.mode]),
        "parallel_tool_calls": use.parallel,
    }


def tool_use_from_proto(chat: baton_pb2.ChatMessages) -> ToolUse | None:
    """The tools of a conversation and how they may be used; None where there are none.

    Raises:
        InvalidRequestError: a tool is wrong, or the choice needs tools that are not there.
    """
    choice = _choice(chat.tool_choice)
    if not chat.tools:
        if choice.mode in (ToolChoiceMode.REQUIRED, ToolChoiceMode.NAMED):
            raise InvalidRequestError("tool_choice asks for a call, but the request has no tools")
        return None
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(chat.tools)} entries, at most {MAX_TOOLS} are allowed")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(chat.tools)]
    return tool_use(tools, choice, chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True)


def _tool(tool: baton_pb2.Tool, where: str) -> Tool:
    parameters: object = None
    if len(tool.parameters) > MAX_TOOL_BYTES:
        size = len(tool.parameters)
        raise InvalidRequestError(f"{where}.parameters has {size} characters, at most {MAX_TOOL_BYTES} are allowed")
    if tool.parameters:
        try:
            parameters = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{where}.parameters is no JSON: {error}") from error
    schema = check_schema(parameters, f"{where}.parameters")
    return Tool(check_name(tool.name, f"{where}.name"), tool.description, schema)


def _choice(choice: baton_pb2.ToolChoice) -> ToolChoice:
    if choice.WhichOneof("choice") == "function":
        return ToolChoice(ToolChoiceMode.NAMED, choice.function)
    return ToolChoice(_MODES_BACK.get(choice.mode, ToolChoiceMode.AUTO))


def deltas_to_proto(deltas: Sequence[Delta]) -> baton_pb2.ChatDelta:
    """A part of an answer; a call's start and what follows of its arguments are one part of it."""
    content, reasoning, calls = "", "", list[baton_pb2.ToolCallDelta]()
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case ToolCallStarted(index, call_id, name):
                calls.append(baton_pb2.ToolCallDelta(index=index, id=call_id, name=name))
            case ArgumentsDelta(index, text):
                if not calls or calls[-1].index != index:
                    calls.append(baton_pb2.ToolCallDelta(index=index))
                calls[-1].arguments += text
    return baton_pb2.ChatDelta(content=content, reasoning=reasoning, tool_calls=calls)


def deltas_from_proto(message: baton_pb2.ChatDelta) -> tuple[Delta, ...]:
    """A part of an answer."""
    deltas: list[Delta] = []
    if message.reasoning:
        deltas.append(ReasoningDelta(message.reasoning))
    if message.content:
        deltas.append(ContentDelta(message.content))
    for call in message.tool_calls:
        if call.name:
            deltas.append(ToolCallStarted(call.index, call.id, call.name))
        if call.arguments:
            deltas.append(ArgumentsDelta(call.index, call.arguments))
    return tuple(deltas)
