"""What a client gets: answers taken from the wire."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.api import RequestReport, Usage
from cluster.conversation.deltas import Delta
from cluster.wire import convert
from cluster.wire.chat import deltas_from_proto
from protos import baton_pb2
from workers.messages import FinishReason


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

    `deltas`: of a chat's answer, what the text says; None where all of it is content.
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
    deltas: tuple[Delta, ...] | None = None


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
        deltas=deltas_from_proto(response.chat_delta) if response.HasField("chat_delta") else None,
    )


def _logprob(message: baton_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.text)
