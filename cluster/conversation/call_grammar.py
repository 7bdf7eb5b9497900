"""The grammar of an answer that must call a function, for the format that the model speaks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from cluster.conversation.call_syntax import CallSyntax
from cluster.conversation.messages import Tool, ToolUse
from cluster.conversation.reasoning_format import ReasoningFormat
from cluster.conversation.tool_format import ToolFormat


def call_grammar(
    tools: ToolFormat,
    use: ToolUse,
    reasoning: ReasoningFormat | None = None,
    *,
    opened: bool = False,
    token_ids: Mapping[str, int] | None = None,
) -> str:
    """A grammar, in the dialect of Lark that llguidance reads, of answers that are calls and nothing else.

    They may begin with reasoning, if the model has any; then comes one call, or several where the request and the
    format allow that, of the functions that the choice leaves, with arguments that their schemas allow.

    Args:
        tools: how calls are written.
        use: the tools, and which of them may be called.
        reasoning: how reasoning is marked; None: there is none.
        opened: the prompt has opened the reasoning.
        token_ids: of the markers that are special tokens, which a grammar must name by id.
    """
    return "\n".join(_Grammar(tools.syntax, token_ids or {}).rules(use, reasoning, opened)) + "\n"


class _Grammar:
    """Rules of one grammar."""

    def __init__(self, syntax: CallSyntax, token_ids: Mapping[str, int]) -> None:
        self._syntax = syntax
        self._token_ids = token_ids
        self._special = re.compile("(" + "|".join(map(re.escape, token_ids)) + ")") if token_ids else None

    def rules(self, use: ToolUse, reasoning: ReasoningFormat | None, opened: bool) -> Iterator[str]:
        """All of them, the first one first."""
        syntax = self._syntax
        thought = "" if reasoning is None else "thought " if opened else "thought? "
        more = f" ({self._text(syntax.separator)} call)*" if use.parallel and syntax.parallel else ""
        section = f"{self._text(syntax.section_begin)} call{more} {self._text(syntax.section_end)}"
        yield f"start: {thought}{section}"
        if reasoning is not None:
            yield from self._thought(reasoning, opened)
        yield "call: " + " | ".join(f"call_{i}" for i in range(len(use.callable)))
        for i, tool in enumerate(use.callable):
            # Replaced, not formatted: JSON is full of braces.
            begin, end = (self._text(text.replace("{name}", tool.name)) for text in (syntax.begin, syntax.end))
            yield f"call_{i}: {begin} arguments_{i} {end}"
            yield from (_elements if syntax.xml_parameters else _json)(i, tool)

    def _thought(self, reasoning: ReasoningFormat, opened: bool) -> Iterator[str]:
        begin = "" if opened else self._text(reasoning.begin)
        behind = f"{self._text(reasoning.behind)} /[ \\n]{{0,4}}/"
        if reasoning.end in self._token_ids:
            yield f"thought: {begin} /(?s:.*)/ {self._text(reasoning.end)} {behind}"
        else:
            yield f"thought: {begin} thinking {behind}"
            yield _up_to("thinking", reasoning.end)

    def _text(self, text: str) -> str:
        """A text, with the special tokens in it by their ids."""
        parts = [text] if self._special is None else self._special.split(text)
        tokens = (
            f"<[{self._token_ids[part]}]>" if part in self._token_ids else _quoted(part) for part in parts if part
        )
        return " ".join(tokens) or '""'


def _json(index: int, tool: Tool) -> Iterator[str]:
    """A call's arguments as JSON."""
    schema = {"type": "object", **(tool.parameters or {})}
    yield f"arguments_{index}: %json {json.dumps(schema)}"


def _elements(index: int, tool: Tool) -> Iterator[str]:
    """A call's arguments as one element a parameter, in the order of the schema."""
    schema = tool.parameters or {}
    properties, required = schema.get("properties"), schema.get("required")
    inner = properties if isinstance(properties, Mapping) else {}
    needed = set(required) if isinstance(required, list) else set()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    optional = [f"element_{index}_{i}" + ("" if name in needed else "?") for i, name in enumerate(inner)]
    yield f"arguments_{index}: " + (" ".join(optional) or '""')
    for i, (name, value) in enumerate(inner.items()):
        begin, end = _quoted(f"<parameter={name}>\n"), "\n</parameter>\n"
        if tool.property_type(name) == "string" and "enum" not in value:
            yield f"element_{index}_{i}: {begin} value_{index}_{i}"
            yield _up_to(f"value_{index}_{i}", end)
        else:
            own = value if isinstance(value, Mapping) else {}
            yield f"element_{index}_{i}: {begin} %json {json.dumps({**shared, **own})} {_quoted(end)}"


def _up_to(rule: str, end: str) -> str:
    """A rule for any text up to where a certain one ends for the first time."""
    escaped = re.escape(end).replace("/", "\\/").replace("\n", "n")
    return f"{rule}[lazy]: /(?s:.*){escaped}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
