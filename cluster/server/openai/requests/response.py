"""A request to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cluster.generation.conversations import Conversation
from cluster.server.openai.errors import UnsupportedFieldError
from cluster.server.openai.requests.messages import Message, chat_messages
from cluster.server.openai.requests.model import FirstError
from cluster.server.openai.requests.sampling import SamplingFields
from cluster.server.openai.requests.structured import text_format
from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_LOGPROBS
from workers.structured_output import StructuredOutput

_LOGPROBS = "message.output_text.logprobs"


class InputItem(Message):
    """A message of the input; other items are not supported."""

    type: str | None = None
    role: str = Field("", max_length=128)


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

    def forms(self) -> dict[str, StructuredOutput]:
        """See `FormFields`; here `text` has OpenAI's."""
        form = text_format(self.text or {})
        return super().forms() | ({} if form is None else {"text.format": form})

    def conversation(self) -> Conversation:
        """The prompt.

        Raises:
            InvalidRequestError: an item of the input is wrong.
            UnsupportedFieldError: an item is no message.
        """
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for number, item in enumerate(items):
            if item.type not in (None, "message"):
                raise UnsupportedFieldError(
                    "input", f"input[{number}] is of type {item.type!r}, which is not supported"
                )
            if not item.role:
                raise InvalidRequestError(f"input[{number}] has no role")
        if self.instructions:
            items = [InputItem(role="system", content=self.instructions), *items]
        return Conversation(chat_messages(items), self.chat_template_kwargs or {})

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
