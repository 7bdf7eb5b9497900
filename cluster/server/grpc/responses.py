"""Answers on the wire."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from cluster.generation.prompt_positions import PromptPosition, ScoredToken
from cluster.generation.text_chunk import TextChunk
from cluster.wire import convert
from cluster.wire.chat import deltas_to_proto
from protos import baton_pb2
from workers.messages import TokenLogprob, TokenOutput


class ResponseWriter:
    """Turns one request's chunks into response messages.

    Args:
        request_id: goes into every message.
        token_text: a token's text by itself, for log-probabilities.
    """

    def __init__(self, request_id: str, token_text: Callable[[int], str]) -> None:
        self._request_id = request_id
        self._token_text = token_text
        self._begin: bytes = baton_pb2.GenerateResponse(request_id=request_id).SerializeToString()

    def part(self, chunk: TextChunk) -> bytes:
        """One message, as it goes on the wire, that says what a part says.

        Of most parts that is text and tokens. What all messages of the request begin with is written once: messages
        whose bytes follow each other are one message with the fields of all (the protobuf encoding's merging).
        """
        token_ids = [token.token_id for token in chunk.tokens if token.logprob is None]
        plain = chunk.finish_reason is None and chunk.deltas is None and chunk.usage is None and not chunk.index
        if not plain or len(token_ids) < len(chunk.tokens) or chunk.prompt_logprobs is not None:
            return bytes(self.response([chunk]).SerializeToString())
        return self._begin + (_one_said if len(token_ids) == 1 else _said)(chunk.text, *token_ids)

    def response(self, chunks: Sequence[TextChunk]) -> baton_pb2.GenerateResponse:
        """One message that says what `chunks`, in order and of one sample, say."""
        return self._message(chunks, chunks, index=chunks[-1].index)

    def whole(self, chunks: Sequence[TextChunk]) -> baton_pb2.GenerateResponse:
        """One message that says what all chunks of a request say: of several samples the first, and a list of all."""
        samples: dict[int, list[TextChunk]] = {}
        for chunk in chunks:
            samples.setdefault(chunk.index, []).append(chunk)
        if len(samples) == 1:
            return self.response(chunks)
        of_all = [baton_pb2.Sample(index=index, **self._answer(own)) for index, own in sorted(samples.items())]
        return self._message(samples[0], chunks, samples=of_all)

    def _message(
        self, answer: Sequence[TextChunk], chunks: Sequence[TextChunk], **others: Any
    ) -> baton_pb2.GenerateResponse:
        last = chunks[-1]
        return baton_pb2.GenerateResponse(
            request_id=self._request_id,
            usage=None if last.usage is None else convert.usage_to_proto(last.usage),
            timings=None if last.report is None else convert.report_to_proto(last.report),
            prompt_logprobs=[_position(position) for chunk in chunks for position in chunk.prompt_logprobs or ()],
            **self._answer(answer),
            **others,
        )

    def _answer(self, chunks: Sequence[TextChunk]) -> dict[str, Any]:
        """What a sample has said, by the wire's names."""
        tokens, last = [token for chunk in chunks for token in chunk.tokens], chunks[-1]
        deltas = None if last.deltas is None else [delta for chunk in chunks for delta in chunk.deltas or ()]
        return {
            "text": "".join(chunk.text for chunk in chunks),
            "token_ids": [token.token_id for token in tokens],
            "logprobs": [self._logprobs(token, token.logprob) for token in tokens if token.logprob is not None],
            "finish_reason": convert.finish_reason_to_proto(last.finish_reason),
            "stop_reason": convert.stop_reason_to_proto(last.stop_reason),
            "chat_delta": None if deltas is None else deltas_to_proto(deltas),
        }

    def _logprobs(self, token: TokenOutput, logprob: float) -> baton_pb2.TokenLogprobs:
        return baton_pb2.TokenLogprobs(
            chosen=self._logprob(TokenLogprob(token.token_id, logprob)),
            top=[self._logprob(entry) for entry in token.top_logprobs],
        )

    def _logprob(self, entry: TokenLogprob) -> baton_pb2.TokenLogprob:
        return baton_pb2.TokenLogprob(
            token_id=entry.token_id, logprob=entry.logprob, text=self._token_text(entry.token_id)
        )


def _said(text: str, *token_ids: int) -> bytes:
    return bytes(baton_pb2.GenerateResponse(text=text, token_ids=token_ids).SerializeToString())


_one_said = functools.lru_cache(maxsize=16_384)(_said)
"""What most messages say, and again and again: a token and its text."""


def _position(position: PromptPosition) -> baton_pb2.TokenLogprobs:
    return baton_pb2.TokenLogprobs(chosen=_scored(position.chosen), top=map(_scored, position.top))


def _scored(token: ScoredToken) -> baton_pb2.TokenLogprob:
    return baton_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob, text=token.text)
