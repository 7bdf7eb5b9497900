"""What a client sends and gets: requests put on the wire, answers taken from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from cluster.api import RequestReport, Usage
from cluster.wire import convert
from protos import baton_pb2
from workers.errors import InvalidRequestError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

Messages = Sequence[tuple[str, str]]
"""Chat messages as (role, content)."""


class Options(TypedDict, total=False):
    """What a client may say of a request beside its prompt and sampling, by the wire's names.

    Attributes:
        model: that it expects; another one than is served is refused.
        request_id: its name for the request, for logs; the server makes one up.
        priority: where requests wait for room, lower ones go first; 0 is the default.
        user: whose request it is: users of one priority take turns.
    """

    model: str
    request_id: str
    priority: int
    user: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and its text by itself."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class PositionLogprobs:
    """The chosen token at one position, and the most likely ones, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class GenerateChunk:
    """A part of an answer (or all of it); `finish_reason`, `stop_reason`, `usage` and `report` are in the last one.

    `stop_reason`: which of the request's stop strings or stop tokens ended it; None: something else did.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    report: RequestReport | None
    stop_reason: str | int | None = None


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    chat: Messages | None,
    sampling: SamplingParams | None,
    **options: Unpack[Options],
) -> baton_pb2.GenerateRequest:
    """The message for `BatonClient.generate`'s arguments.

    Raises:
        InvalidRequestError: not exactly one form of prompt, or a value that cannot be put on the wire.
    """
    if sum(form is not None for form in (prompt, token_ids, chat)) != 1:
        raise InvalidRequestError("give exactly one of prompt, token_ids and chat")
    try:
        return baton_pb2.GenerateRequest(
            text=prompt,
            token_ids=None if token_ids is None else baton_pb2.TokenIds(ids=token_ids),
            chat=None if chat is None else _chat(chat),
            sampling=None if sampling is None else convert.sampling_to_proto(sampling),
            **options,
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def tokenize_request(prompt: str | None, chat: Messages | None) -> baton_pb2.TokenizeRequest:
    """The message for `BatonClient.tokenize`'s arguments. Errors as in `generate_request`."""
    if (prompt is None) == (chat is None):
        raise InvalidRequestError("give exactly one of prompt and chat")
    try:
        return baton_pb2.TokenizeRequest(text=prompt, chat=None if chat is None else _chat(chat))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def scale_request(targets: Mapping[str, int]) -> baton_pb2.ScaleRequest:
    """The message for `BatonClient.scale`'s targets. Errors as in `generate_request`."""
    try:
        return baton_pb2.ScaleRequest(targets=dict(targets))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error


def _chat(messages: Messages) -> baton_pb2.ChatMessages:
    return baton_pb2.ChatMessages(
        messages=[baton_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )


def chunk(response: baton_pb2.GenerateResponse) -> GenerateChunk:
    """What a response message says."""
    return GenerateChunk(
        request_id=response.request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(
            PositionLogprobs(_logprob(entry.chosen), tuple(map(_logprob, entry.top))) for entry in response.logprobs
        ),
        finish_reason=convert.finish_reason_from_proto(response.finish_reason),
        usage=convert.usage_from_proto(response.usage) if response.HasField("usage") else None,
        report=convert.report_from_proto(response.timings) if response.HasField("timings") else None,
        stop_reason=convert.stop_reason_from_proto(response.stop_reason),
    )


def _logprob(message: baton_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.text)
