"""The formats that there are, by name, and which one a model speaks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cluster.conversation.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from cluster.conversation.formats.harmony import HARMONY
from cluster.conversation.formats.hermes import HERMES
from cluster.conversation.formats.llama3 import LLAMA3_JSON
from cluster.conversation.formats.mistral import MISTRAL, MISTRAL_V11
from cluster.conversation.formats.qwen3_coder import QWEN3_CODER
from cluster.conversation.reasoning_format import HARMONY_REASONING, MISTRAL_THINK, THINK, ReasoningFormat
from cluster.conversation.tool_format import ToolFormat
from workers.errors import ConfigError

TOOL_FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    MISTRAL,
    MISTRAL_V11,
    QWEN3_CODER,
    HERMES,
    LLAMA3_JSON,
)
REASONING_FORMATS: tuple[ReasoningFormat, ...] = (HARMONY_REASONING, MISTRAL_THINK, THINK)
AUTO, NONE = "auto", "none"
_Known = TypeVar("_Known", bound="_Named")

_TOOLS_OF_TYPE = {"gpt_oss": HARMONY}
_REASONING_OF_TYPE = {"gpt_oss": HARMONY_REASONING}


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Formats:
    """What a served model speaks; None: no tools, or no reasoning."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None


NO_FORMATS = Formats()


def choose_formats(tool_format: str, reasoning_format: str, chat_template: str, model_type: str = "") -> Formats:
    """The formats that settings name, or, where they say auto, that the model speaks.

    Args:
        tool_format: `model.tool_format`: auto, none or a name.
        reasoning_format: `model.reasoning_format`.
        chat_template: the checkpoint's; empty if it has none.
        model_type: of its config.json; what tells where the template does not.

    Raises:
        ConfigError: there is no format of that name.
    """
    tools = _named("model.tool_format", tool_format, TOOL_FORMATS)
    reasoning = _named("model.reasoning_format", reasoning_format, REASONING_FORMATS)
    if tool_format == AUTO:
        tools = next((known for known in TOOL_FORMATS if known.describes(chat_template)), None)
        tools = tools or _TOOLS_OF_TYPE.get(model_type)
    if reasoning_format == AUTO:
        reasoning = _detected_reasoning(tools, chat_template, model_type)
    return Formats(tools, reasoning)


def _detected_reasoning(tools: ToolFormat | None, chat_template: str, model_type: str) -> ReasoningFormat | None:
    if tools is HARMONY:
        return HARMONY_REASONING
    found = next((known for known in REASONING_FORMATS if known.describes(chat_template)), None)
    return found or _REASONING_OF_TYPE.get(model_type)


def _named(key: str, name: str, known: Sequence[_Known]) -> _Known | None:
    """The format of that name or alias; None for auto and none."""
    if name in (AUTO, NONE):
        return None
    spellings = [AUTO, NONE]
    for known_format in known:
        if name in (known_format.name, *known_format.aliases):
            return known_format
        spellings += (known_format.name, *known_format.aliases)
    near = difflib.get_close_matches(name.lower(), spellings, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    names = ", ".join((AUTO, NONE, *(known_format.name for known_format in known)))
    raise ConfigError(f"{key} is {name!r}, it must be one of {names}{meant}")
