"""Conversations with a served model: prompts by its chat template, and answers taken apart by its formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.conversation.answer import AnswerParser
from cluster.conversation.call_grammar import call_grammar
from cluster.conversation.deltas import Delta
from cluster.conversation.formats.llama3 import LLAMA3_JSON
from cluster.conversation.messages import ChatMessage, ToolChoiceMode, ToolUse
from cluster.conversation.registry import Formats
from cluster.generation.marker_positions import Markers
from cluster.text.tokenizer import Tokenizer
from workers.errors import InvalidRequestError
from workers.token_ids import TokenIds

_FORCED = (ToolChoiceMode.REQUIRED, ToolChoiceMode.NAMED)
_TAIL = 16
"""Tokens of a prompt, in whose text the marker of reasoning is looked for."""


@dataclass(frozen=True)
class Conversation:
    """Chat messages, oldest first, and how the checkpoint's template is to write them; see `Tokenizer`.

    `tool_use`: what the model may call; None: nothing.
    """

    messages: tuple[ChatMessage, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tool_use: ToolUse | None = None


class AnswerReader:
    """Takes one answer apart. See `AnswerParser`."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser

    def read(self, text: str, markers: Markers, *, ended: bool) -> tuple[Delta, ...]:
        """What a part of the answer adds; `ended`: it is the last one."""
        deltas: list[Delta] = []
        at = 0
        for position, marker in markers:
            deltas += self._parser.push(text[at:position])
            deltas += self._parser.push_token(marker)
            at = position
        deltas += self._parser.push(text[at:])
        if ended:
            deltas += self._parser.finish()
        return tuple(deltas)

    @property
    def calls_tools(self) -> bool:
        """Whether the answer has calls, and all of them are whole."""
        return self._parser.calls_tools


class Conversations:
    """What one model's conversations need.

    Args:
        tokenizer: of its checkpoint.
        formats: that it speaks.

    Attributes:
        marker_ids: the markers that are special tokens, by id.
    """

    def __init__(self, tokenizer: Tokenizer, formats: Formats) -> None:
        self._tokenizer = tokenizer
        self._formats = formats
        markers = () if formats.tools is None else formats.tools.markers
        if formats.reasoning is not None:
            markers += (formats.reasoning.begin, formats.reasoning.end)
        special = tokenizer.special_token_ids
        self._special = {marker: special[marker] for marker in markers if marker in special}
        self.marker_ids: dict[int, str] = {token_id: marker for marker, token_id in self._special.items()}

    def render(self, chat: Conversation) -> str:
        """The prompt.

        Raises:
            InvalidRequestError: the template refuses the messages, or nothing is known of how the model calls tools.
        """
        use, tool_format = chat.tool_use, self._formats_for(chat).tools
        if use is not None and use.choice.mode is not ToolChoiceMode.NONE and tool_format is None:
            raise InvalidRequestError(
                "tools are given, but how this model writes tool calls is not known; the service's setting "
                "model.tool_format can name a format"
            )
        tools = () if use is None or use.choice.mode is ToolChoiceMode.NONE else use.tools
        return self._tokenizer.apply_chat_template(
            chat.messages,
            chat.variables,
            tools=tools,
            tool_format=tool_format,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
        )

    def reader(
        self, chat: Conversation, prompt_token_ids: TokenIds, *, shows_special_tokens: bool = False
    ) -> AnswerReader | None:
        """What takes an answer apart; None where all of it is content.

        Args:
            chat: what is answered.
            prompt_token_ids: its prompt.
            shows_special_tokens: the answer's text has special tokens in it.
        """
        formats = self._formats_for(chat)
        tools = formats.tools
        if formats.reasoning is None and (tools is None or not (tools.reasons or chat.tool_use is not None)):
            return None
        special = () if shows_special_tokens else tuple(self._special)
        prompt = self._end_of(prompt_token_ids)
        if chat.continue_final_message and formats.reasoning is not None:
            prompt = formats.reasoning.left_open_in(chat.messages[-1].content)
        return AnswerReader(AnswerParser(formats, chat.tool_use, prompt, special))

    def call_grammar(self, chat: Conversation, prompt_token_ids: TokenIds) -> str | None:
        """The grammar of an answer that must call a function; None where it need not. See `call_grammar`."""
        use, formats = chat.tool_use, self._formats_for(chat)
        if use is None or use.choice.mode not in _FORCED or formats.tools is None:
            return None
        reasoning = formats.reasoning
        opened = reasoning is not None and reasoning.opened_by(self._end_of(prompt_token_ids))
        return call_grammar(formats.tools, use, reasoning, opened=opened, token_ids=self._special)

    def _formats_for(self, chat: Conversation) -> Formats:
        """A call that is forced by a grammar can be written as plain JSON by a model of no known format."""
        use = chat.tool_use
        if self._formats.tools is None and use is not None and use.choice.mode in _FORCED:
            return replace(self._formats, tools=LLAMA3_JSON)
        return self._formats

    def _end_of(self, prompt_token_ids: TokenIds) -> str:
        return self._tokenizer.with_special_tokens.text_of(prompt_token_ids[-_TAIL:].tolist())
