"""A conversation's parts: messages, tools that the model may call, and whether it must."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGES = 8192
"""Of a conversation, empty ones too: each is an object here and a turn of the template's loop."""


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant has made. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; which roles exist is up to the checkpoint's template.

    Attributes:
        role: who speaks: "system", "user", "assistant", "tool", or what else the template knows.
        content: what is said.
        tool_calls: that an assistant made in this message.
        tool_call_id: of a tool's message, the call that it answers.
        name: of who speaks, or of the tool.
        reasoning_content: what an assistant thought before it spoke.
    """

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning_content: str = ""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: letters, digits, `_`, `-` and `.`.
        description: for the model; empty where there is none.
        parameters: JSON schema of the arguments, an object; None: any.
        strict: whether the client wants arguments that obey the schema; None: it did not say.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = field(default=None, hash=False)
    strict: bool | None = None

    def property_type(self, name: str) -> str | None:
        """The one JSON type that the schema gives a parameter; None where it gives none, or several."""
        properties = (self.parameters or {}).get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        return kind if isinstance(kind, str) else None


class ToolChoiceMode(enum.Enum):
    """Whether the model calls tools."""

    NONE = "none"
    AUTO = "auto"
    """As it likes."""
    REQUIRED = "required"
    """At least one."""
    NAMED = "named"
    """One certain function."""


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model calls tools, and for `NAMED` which one."""

    mode: ToolChoiceMode
    name: str = ""


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request, and how they may be used.

    Attributes:
        tools: at least one, of unlike names.
        choice: whether they are called.
        parallel: whether an answer may have several calls.
        num_bytes: of descriptions and schemas together, if it is known.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice(ToolChoiceMode.AUTO)
    parallel: bool = True
    num_bytes: int = field(default=0, compare=False)

    @property
    def names(self) -> frozenset[str]:
        """Of the functions that may be called."""
        return frozenset(tool.name for tool in self.callable)

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the choice leaves."""
        if self.choice.mode is ToolChoiceMode.NAMED:
            return tuple(tool for tool in self.tools if tool.name == self.choice.name)
        return () if self.choice.mode is ToolChoiceMode.NONE else self.tools
