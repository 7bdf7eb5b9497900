"""Answers on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.gateway.text_generation import TextChunk
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

    def response(self, chunks: Sequence[TextChunk]) -> baton_pb2.GenerateResponse:
        """One message that says what `chunks`, in order, say."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        last = chunks[-1]
        deltas = None if last.deltas is None else [delta for chunk in chunks for delta in chunk.deltas or ()]
        return baton_pb2.GenerateResponse(
            request_id=self._request_id,
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token.token_id for token in tokens],
            logprobs=[self._logprobs(token, token.logprob) for token in tokens if token.logprob is not None],
            finish_reason=convert.finish_reason_to_proto(last.finish_reason),
            usage=None if last.usage is None else convert.usage_to_proto(last.usage),
            chat_delta=None if deltas is None else deltas_to_proto(deltas),
            stop_reason=convert.stop_reason_to_proto(last.stop_reason),
            timings=None if last.report is None else convert.report_to_proto(last.report),
        )

    def _logprobs(self, token: TokenOutput, logprob: float) -> baton_pb2.TokenLogprobs:
        return baton_pb2.TokenLogprobs(
            chosen=self._logprob(TokenLogprob(token.token_id, logprob)),
            top=[self._logprob(entry) for entry in token.top_logprobs],
        )

    def _logprob(self, entry: TokenLogprob) -> baton_pb2.TokenLogprob:
        return baton_pb2.TokenLogprob(
            token_id=entry.token_id, logprob=entry.logprob, text=self._token_text(entry.token_id)
        )
