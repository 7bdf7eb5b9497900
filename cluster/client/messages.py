"""What a client gets: answers taken from the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.api import RequestReport, Usage
from cluster.conversation.deltas import Delta, MessageBuilder
from cluster.conversation.messages import ChatMessage
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
class Sample:
    """One of several answers to a prompt, whole."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    deltas: tuple[Delta, ...] | None = None

    @property
    def message(self) -> ChatMessage:
        """What it says, as a message that the conversation can go on with."""
        return _said(self.text, self.deltas)


@dataclass(frozen=True)
class GenerateChunk:
    """A part of an answer (or all of it); `finish_reason`, `stop_reason`, `usage` and `report` are in the last one.

    Attributes:
        request_id: the client's name for the request, or the server's.
        text: what comes behind the text so far.
        token_ids: the tokens since the part before.
        logprobs: of each of these; empty unless they were asked for.
        finish_reason: why the text ended; None: it goes on.
        usage: token counts, of all samples.
        report: where the request went.
        index: of several samples the one that the above is of.
        samples: of a whole answer of several samples all of them, the first one too; else empty.
        prompt_logprobs: of each token of the prompt but the first, in the first part, if they were asked for.
        stop_reason: which of the request's stop strings or stop tokens ended it; None: something else did.
        deltas: of a chat's answer, what the text says; None where all of it is content.
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
    index: int = 0
    samples: tuple[Sample, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def message(self) -> ChatMessage:
        """Of a whole answer: what it says, as a message that the conversation can go on with."""
        return _said(self.text, self.deltas)


def chunk(response: baton_pb2.GenerateResponse) -> GenerateChunk:
    """What a response message says."""
    return GenerateChunk(
        request_id=response.request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_positions(response.logprobs),
        finish_reason=convert.finish_reason_from_proto(response.finish_reason),
        usage=convert.usage_from_proto(response.usage) if response.HasField("usage") else None,
        report=convert.report_from_proto(response.timings) if response.HasField("timings") else None,
        stop_reason=convert.stop_reason_from_proto(response.stop_reason),
        deltas=deltas_from_proto(response.chat_delta) if response.HasField("chat_delta") else None,
        index=response.index,
        samples=tuple(map(_sample, response.samples)),
        prompt_logprobs=_positions(response.prompt_logprobs),
    )


def _sample(message: baton_pb2.Sample) -> Sample:
    return Sample(
        message.index,
        message.text,
        tuple(message.token_ids),
        _positions(message.logprobs),
        convert.finish_reason_from_proto(message.finish_reason),
        convert.stop_reason_from_proto(message.stop_reason),
        deltas_from_proto(message.chat_delta) if message.HasField("chat_delta") else None,
    )


def _said(text: str, deltas: tuple[Delta, ...] | None) -> ChatMessage:
    if deltas is None:
        return ChatMessage("assistant", text)
    builder = MessageBuilder()
    builder.add(deltas)
    return builder.message


def _positions(messages: Iterable[baton_pb2.TokenLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(PositionLogprobs(_logprob(entry.chosen), tuple(map(_logprob, entry.top))) for entry in messages)


def _logprob(message: baton_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.text)
