"""Answers as models of every family write them, and how a parser reads them."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.conversation.answer import AnswerParser
from cluster.conversation.deltas import Delta, MessageBuilder
from cluster.conversation.messages import ChatMessage, Tool, ToolUse
from cluster.conversation.registry import choose_formats

WEATHER = Tool(
    "get_weather",
    "The weather in a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "fine": {"type": "boolean"}},
        "required": ["city"],
    },
)
CLOCK = Tool("clock", "What time it is", {"type": "object", "properties": {"city": {"type": "string"}}})
USE = ToolUse((WEATHER, CLOCK))

CALLS = [("get_weather", {"city": "Kyōto", "days": 2}), ("clock", {})]
"""What each of `TWO_CALLS` says, behind the content "I look."."""
TWO_CALLS = {
    "hermes": 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kyōto", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nKyōto\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Kyōto", "days": 2}}; '
    '{"name": "clock", "parameters": {}}',
    "mistral": 'I look.[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Kyōto", "days": 2}, '
    '"id": "abcdefghi"}, {"name": "clock", "arguments": {}}]',
    "mistral_v11": 'I look.[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Kyōto", "days": 2}'
    "[TOOL_CALLS]clock[ARGS]{}",
    "deepseek_v3": "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Kyōto", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n'
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Kyōto", "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"city": "Kyōto", "days": 2}<|call|><|start|>assistant '
    "to=functions.clock<|channel|>commentary json<|message|>{}<|call|>",
}
REASONING_OF = {"mistral": "mistral", "mistral_v11": "mistral", "harmony": "harmony"}


def parser_of(tool_format: str, use: ToolUse | None = USE, prompt: str = "", **options: object) -> AnswerParser:
    """A parser of this format's tools and the reasoning that goes with it."""
    formats = choose_formats(tool_format, REASONING_OF.get(tool_format, "think"), "")
    return AnswerParser(formats, use, prompt, **options)  # type: ignore[arg-type]


def read(parser: AnswerParser, pieces: Iterable[str]) -> ChatMessage:
    """The whole message of an answer in these pieces."""
    builder = MessageBuilder()
    for piece in pieces:
        builder.add(parser.push(piece))
    builder.add(parser.finish())
    return builder.message


def read_deltas(parser: AnswerParser, pieces: Iterable[str]) -> list[list[Delta]]:
    """What each piece adds, and at last the end."""
    return [*(parser.push(piece) for piece in pieces), parser.finish()]


def without_ids(message: ChatMessage) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and calls as name and arguments: ids are drawn anew each time."""
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.content, message.reasoning_content, calls
