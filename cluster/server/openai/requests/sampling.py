"""The fields that say how tokens are chosen, and how an answer is written: OpenAI's, and those that vLLM adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from cluster.request_id import check_name
from cluster.server.openai.requests.model import RequestModel, StopTexts, Texts, TokenIdList
from cluster.server.openai.requests.structured import FormFields
from cluster.text.sampling_defaults import with_defaults
from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_BAD_WORDS, MAX_LISTED_TOKENS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_N = 128
_INT32 = 2**31
_PLAIN = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
"""Fields that are parameters as they are."""


class StreamOptions(RequestModel):
    """What a stream has beside the answer: usage at its end, and (as in vLLM) in each event."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(FormFields):
    """The fields that requests for text share."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: StopTexts | None = None
    stop_token_ids: Annotated[TokenIdList, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: Annotated[Texts, Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[TokenIdList, Field(min_length=1, max_length=MAX_LISTED_TOKENS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    priority: int | None = Field(None, ge=-_INT32, lt=_INT32)
    cache_salt: str | None = Field(None, min_length=1, max_length=4096)

    def sampling(self, defaults: Mapping[str, Any], **own: Any) -> SamplingParams:
        """The parameters, with what an endpoint has read of its `own` fields; what is None there is left open.

        Raises:
            InvalidRequestError: a value out of range.
        """
        values = self.given(*_PLAIN) | {name: value for name, value in own.items() if value is not None}
        if self.top_k is not None:
            values["top_k"] = max(0, self.top_k) if self.top_k == -1 else self.top_k
        if self.seed is not None and self.seed != -1:
            values["seed"] = self.seed % 2**64
        values["stop"] = tuple(self.stop or ())
        values["stop_token_ids"] = tuple(self.stop_token_ids or ())
        values["bad_words"] = tuple(self.bad_words or ())
        values["allowed_token_ids"] = tuple(self.allowed_token_ids or ())
        values["logit_bias"] = _biases(self.logit_bias or {})
        values["structured_output"] = self.structured_output()
        return with_defaults(values, defaults)

    def options(self) -> dict[str, Any]:
        """What `GenerationRequest` has of them beside prompt and sampling.

        Raises:
            InvalidRequestError: `user` is too long.
        """
        return {
            "model": self.model or "",
            "add_special_tokens": self.add_special_tokens,
            "user": check_name("user", self.user or ""),
            "priority": self.priority or 0,
            "cache_salt": (self.cache_salt or "").encode("utf-8", "replace"),
        }


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Biases by token, whose keys are texts in JSON.

    Raises:
        InvalidRequestError: a key is no token id.
    """
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 11):
            raise InvalidRequestError(f"logit_bias has the key {token:.40}, which is no token id")
    return tuple((int(token), bias) for token, bias in given.items())


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> StreamOptions:
    """The options of a stream.

    Raises:
        InvalidRequestError: there are some without a stream.
    """
    if options is not None and not stream:
        raise InvalidRequestError("stream_options are given without stream=true")
    return options or StreamOptions()
