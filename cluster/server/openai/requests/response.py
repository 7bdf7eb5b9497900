"""A request to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cluster.conversation.messages import ChatMessage
from cluster.generation.conversations import Conversation
from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.messages import check_number
from cluster.server.openai.requests.model import FirstError
from cluster.server.openai.requests.response_input import InputItem, input_messages
from cluster.server.openai.requests.response_tools import response_tools
from cluster.server.openai.requests.sampling import SamplingFields
from cluster.server.openai.requests.structured import text_format
from workers.sampling_params import MAX_LOGPROBS
from workers.structured_output import StructuredOutput

_LOGPROBS = "message.output_text.logprobs"


class ResponseRequest(SamplingFields):
    """A text, or a conversation that the model is to go on with."""

    input: str | Annotated[list[InputItem], FirstError()]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: dict[str, Any] | None = None
    include: Annotated[list[str], FirstError()] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def forms(self) -> dict[str, StructuredOutput]:
        """See `FormFields`; here `text` has OpenAI's."""
        form = text_format(self.text or {})
        return super().forms() | ({} if form is None else {"text.format": form})

    def conversation(self) -> Conversation:
        """The prompt.

        Raises:
            InvalidRequestError: an item of the input, or a tool, is wrong.
            UnsupportedFieldError: an item or a tool is of a kind that is not supported.
        """
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        check_number(items, "input")
        messages = input_messages(items)
        if self.instructions:
            messages = (ChatMessage("system", self.instructions), *messages)
        use = response_tools(self.tools, self.tool_choice, self.parallel_tool_calls)
        return Conversation(messages, self.chat_template_kwargs or {}, tool_use=use)

    @property
    def num_logprobs(self) -> int | None:
        """Of the most likely tokens, so many have log-probabilities; None: none, the chosen one neither.

        Raises:
            UnsupportedFieldError: `include` names something else.
        """
        for name in self.include or []:
            if name not in (_LOGPROBS, "reasoning.encrypted_content"):
                raise UnsupportedFieldError("include", f"include has {name!r}, which is not supported")
        wanted = _LOGPROBS in (self.include or []) or bool(self.top_logprobs)
        return (self.top_logprobs or 0) if wanted else None
