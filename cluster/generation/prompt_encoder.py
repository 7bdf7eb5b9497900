"""From a prompt, a text, token ids or a conversation, to token ids that fit the context window."""

from __future__ import annotations

import numpy as np

from cluster.api import ModelInfo
from cluster.generation.conversations import Conversation, Conversations
from cluster.generation.intake import AT_ONCE_BYTES
from cluster.text.tokenizer import Tokenizer
from workers.errors import InvalidRequestError
from workers.token_ids import TokenIds, as_token_ids
from workers.validation import check_token_ids

Prompt = str | TokenIds | Conversation
"""A text, token ids, or a conversation for the checkpoint's chat template."""


_MESSAGE_BYTES = 64
"""What a message costs besides its texts, in bytes of text."""


def prompt_bytes(prompt: Prompt) -> int:
    """How much work a prompt is, as bytes of text: about as many as it has."""
    if isinstance(prompt, np.ndarray):
        return prompt.nbytes
    if isinstance(prompt, str):
        return max(AT_ONCE_BYTES + 1, len(prompt))  # tokenising takes longer than the way to a thread
    said = sum(len(each.content) + len(each.reasoning_content) + _MESSAGE_BYTES for each in prompt.messages)
    calls = sum(len(call.arguments) + _MESSAGE_BYTES for each in prompt.messages for call in each.tool_calls)
    tools = 0 if prompt.tool_use is None else prompt.tool_use.num_bytes
    return max(AT_ONCE_BYTES + 1, said + calls + tools)


class PromptEncoder:
    """Checks prompts and turns them into token ids. Threads may share one.

    Args:
        tokenizer: of the served checkpoint.
        conversations: of the model.
        model: its limits.
    """

    def __init__(self, tokenizer: Tokenizer, conversations: Conversations, model: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._model = model

    def token_ids(self, prompt: Prompt, add_special_tokens: bool | None) -> TokenIds:
        """(n,) int32, the prompt.

        Args:
            prompt: token ids are checked, and otherwise left as they are.
            add_special_tokens: those that the tokenizer adds to a text; None: to a text, and not to a conversation.

        Raises:
            InvalidRequestError: it is empty, too long, has ids out of range, or the chat template refuses it.
        """
        if isinstance(prompt, np.ndarray):
            check_token_ids(prompt, self._model.vocab_size)
            self._check_length(len(prompt))
            return prompt
        is_text = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._conversations.render(prompt)
        if is_text and not text:
            raise InvalidRequestError("the prompt is empty")
        self._tokenizer.check_length(text, self._model.max_model_len)
        add = is_text if add_special_tokens is None else add_special_tokens
        token_ids = as_token_ids(self._tokenizer.encode(text, add_special_tokens=add))
        self._check_length(len(token_ids))
        return token_ids

    def _check_length(self, num_tokens: int) -> None:
        limit = self._model.max_model_len
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty")
        if num_tokens + 1 > limit:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; with one token to generate that is more than the context window "
                f"of {limit} tokens"
            )
