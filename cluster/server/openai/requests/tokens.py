"""Requests to /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from cluster.server.openai.requests.chat import TemplateFields
from cluster.server.openai.requests.model import RequestModel, TokenIdList


class TokenizeRequest(RequestModel):
    """A text; `TokenizeChatRequest` has messages in its place."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """A conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """Token ids."""

    tokens: TokenIdList
    model: str | None = None
