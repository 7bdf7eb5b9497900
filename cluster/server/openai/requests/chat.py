"""A request to /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cluster.conversation.read_tools import read_tool_use
from cluster.generation.conversations import Conversation
from cluster.server.openai.requests.messages import Messages, chat_messages
from cluster.server.openai.requests.model import RequestModel
from cluster.server.openai.requests.sampling import MAX_N, SamplingFields, StreamOptions
from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_LOGPROBS


class TemplateFields(RequestModel):
    """How the checkpoint's template is to write a conversation: fields that vLLM adds."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def conversation(self) -> Conversation:
        """The prompt.

        Raises:
            InvalidRequestError: a message, a tool, or what the template is told, is wrong.
        """
        go_on = bool(self.continue_final_message)
        if go_on and self.add_generation_prompt:
            raise InvalidRequestError("continue_final_message and add_generation_prompt exclude each other")
        begin = not go_on if self.add_generation_prompt is None else self.add_generation_prompt
        variables = self.given("reasoning_effort") | (self.chat_template_kwargs or {})
        use = read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)
        return Conversation(chat_messages(self.messages), variables, begin, go_on, use)


class ChatCompletionRequest(TemplateFields, SamplingFields):
    """A conversation that the model is to go on with, `n` times."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    best_of: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream_options: StreamOptions | None = None
    include_reasoning: bool | None = None

    @property
    def longest(self) -> int | None:
        """Tokens of an answer at most, by either name.

        Raises:
            InvalidRequestError: the two contradict each other.
        """
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequestError(f"max_tokens is {old} and max_completion_tokens {new}: give one")
        return old if new is None else new

    @property
    def num_logprobs(self) -> int | None:
        """Of the most likely tokens, so many have log-probabilities; None: none, the chosen one neither.

        Raises:
            InvalidRequestError: `top_logprobs` without `logprobs`.
        """
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequestError("top_logprobs is given without logprobs=true")
            return None
        return self.top_logprobs or 0
