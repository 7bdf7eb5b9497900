"""A checkpoint's chat template: from messages and tools to a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.conversation.messages import ChatMessage, Tool
from cluster.conversation.template_view import (
    Message,
    TemplateStyle,
    detect_style,
    template_messages,
    template_tools,
    unchanged,
    with_tools_described,
)
from cluster.conversation.tool_format import ToolFormat

RENDER_LIMIT_S = 10.0
"""For writing out one conversation: a template may go through the messages once for each of them."""


class TimedMessages(list[Message]):
    """Messages that can be gone through until it is too late.

    Args:
        messages: what they are.
        deadline: monotonic time.
    """

    def __init__(self, messages: Iterable[Message], deadline: float) -> None:
        super().__init__(messages)
        self._deadline = deadline

    def __iter__(self) -> Iterator[Message]:
        for message in super().__iter__():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"it takes longer than the limit of {RENDER_LIMIT_S:g} s")
            yield message

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return TimedMessages(found, self._deadline) if isinstance(place, slice) else found


class ChatTemplate:
    """The template of one tokenizer. Threads may share it.

    Args:
        hf_tokenizer: of transformers, which knows the template and the special tokens that it may write.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._styles: dict[ToolFormat | None, TemplateStyle] = {}

    @property
    def text(self) -> str:
        """The template; of several, all of them one after the other; empty if there is none."""
        template = self._hf.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    def render(
        self,
        messages: Sequence[ChatMessage],
        variables: Mapping[str, Any],
        *,
        tools: Sequence[Tool],
        tool_format: ToolFormat | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """The prompt for a conversation, up to where the model's answer begins.

        Args:
            messages: oldest first; at least one.
            variables: more that the template may look at.
            tools: that the model may call. A template that takes none is given them in the system's message.
            tool_format: that the model speaks.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end in the last message.

        Raises:
            Exception: a template is a program: it raises what it likes.
        """
        text = self.text
        if tools and tool_format is not None and "tools" not in text:
            messages, tools = with_tools_described(messages, tools, tool_format.syntax), ()
        adapt = unchanged if tool_format is None else tool_format.adapt
        style = self._style(tool_format) if any(message.tool_calls for message in messages) else TemplateStyle()
        given = template_messages(messages, adapt, style, knows_developer="developer" in text)
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        return self._render(given, template_tools(tools), **variables, **ending)

    def _style(self, tool_format: ToolFormat | None) -> TemplateStyle:
        if tool_format not in self._styles:
            adapt = unchanged if tool_format is None else tool_format.adapt
            self._styles[tool_format] = detect_style(self._render, adapt)
        return self._styles[tool_format]

    def _render(self, messages: list[Message], tools: list[Message] | None, **variables: Any) -> str:
        # The tokenizer's own method drops what is None, and some templates look for None.
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._hf.get_chat_template(None, tools)
        known = {**self._hf.special_tokens_map, **variables}
        timed = TimedMessages(messages, time.monotonic() + RENDER_LIMIT_S)
        rendered, _ = render_jinja_template([timed], tools=tools, chat_template=template, **known)
        return str(rendered[0])
