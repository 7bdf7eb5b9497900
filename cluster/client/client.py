"""The blocking client of the service, in Baton's own types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from cluster.api import Explanation, ModelInfo, PoolTarget, ServerInfo, WorkerStatus
from cluster.client.async_client import AsyncBatonClient
from cluster.client.connection import DEFAULT_ADDRESS, MAX_RESPONSE_BYTES, Connection
from cluster.client.conversations import ConversationOptions, Messages
from cluster.client.errors import BatonClientError, call_errors
from cluster.client.health import check
from cluster.client.messages import GenerateChunk, chunk
from cluster.client.requests import Options, generate_request, scale_request, tokenize_request
from cluster.trace_context import outgoing
from cluster.wire import convert
from protos import baton_pb2, baton_pb2_grpc
from workers.sampling_params import SamplingParams

__all__ = ["DEFAULT_ADDRESS", "AsyncBatonClient", "BatonClient", "BatonClientError", "Connection"]

_OPTIONS = (("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),)


class BatonClient:
    """A blocking client; threads may share one. Close it, or use it in a `with` statement.

    Args:
        server: host:port, or a `Connection`, which has TLS and a token; None: the default address.

    Raises:
        ConfigError: the address is none, a TLS file cannot be read or used, or the token cannot be sent.
    """

    def __init__(self, server: Connection | str | None = None) -> None:
        self._connection = Connection.of(server)
        target, credentials = self._connection.target, self._connection.credentials()
        self._metadata = self._connection.metadata()
        self._channel = (
            grpc.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, _OPTIONS)
        )
        self._stub = baton_pb2_grpc.BatonStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Iterator[GenerateChunk]:
        """Generate from exactly one of `prompt`, `token_ids` and `chat`, part by part.

        Closing the iterator cancels the request. What else can be asked for is in `Options`: the fields of
        `SamplingParams`, such as `max_tokens=16, temperature=0`, what concerns the request as a whole, and a
        conversation's `tools` and `tool_choice`. What an answer says, calls too, is in `GenerateChunk.message`; of
        an answer in parts, what their `deltas` add up to in a `MessageBuilder`.

        Args:
            prompt: a text.
            token_ids: a prompt's token ids.
            chat: a conversation, see `cluster.client.conversations.Messages`.
            sampling: how tokens are chosen; keywords win over it.
            timeout_s: the deadline of all of it.
            options: see above.

        Raises:
            InvalidRequestError: the request cannot be put on the wire.
            BatonClientError: the call failed.
        """
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        return self._generate(request, timeout_s)

    def _generate(self, request: baton_pb2.GenerateRequest, timeout_s: float | None) -> Iterator[GenerateChunk]:
        with call_errors(self._connection):
            call = self._stub.Generate(request, timeout=timeout_s, metadata=[*self._metadata, *outgoing()])
            try:
                for response in call:
                    yield chunk(response)
            finally:
                call.cancel()

    def generate_once(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> GenerateChunk:
        """Generate and return the answer whole. Arguments and errors as in `generate`."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with call_errors(self._connection):
            return chunk(self._stub.GenerateOnce(request, timeout=timeout_s, metadata=[*self._metadata, *outgoing()]))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        chat: Messages | None = None,
        timeout_s: float | None = None,
        **options: Unpack[ConversationOptions],
    ) -> list[int]:
        """Token ids of exactly one of `prompt` and `chat`. Errors as in `generate`."""
        request = tokenize_request(prompt, chat, **options)
        with call_errors(self._connection):
            return list(self._stub.Tokenize(request, timeout=timeout_s, metadata=self._metadata).token_ids)

    def model_info(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model.

        Raises:
            BatonClientError: the call failed.
        """
        request = baton_pb2.GetModelInfoRequest()
        with call_errors(self._connection):
            response = self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.model_info_from_proto(response)

    def server_info(self, timeout_s: float | None = None) -> ServerInfo:
        """The program that serves. Errors as in `model_info`."""
        request = baton_pb2.GetServerInfoRequest()
        with call_errors(self._connection):
            response = self._stub.GetServerInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.server_info_from_proto(response)

    def explain(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Explanation:
        """Where the request would go if it came now; nothing is generated. Arguments and errors as in `generate`."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with call_errors(self._connection):
            response = self._stub.Explain(request, timeout=timeout_s, metadata=self._metadata)
        return convert.explanation_from_proto(response)

    def workers(self, timeout_s: float | None = None) -> list[WorkerStatus]:
        """All workers, prefill first.

        Raises:
            BatonClientError: the call failed.
        """
        request = baton_pb2.ListWorkersRequest()
        with call_errors(self._connection):
            response = self._stub.ListWorkers(request, timeout=timeout_s, metadata=self._metadata)
        return convert.workers_from_proto(response.workers)

    def scale(self, targets: Mapping[str, int], timeout_s: float | None = None) -> list[PoolTarget]:
        """Have pools grow or shrink to so many workers, by role, and return all targets; they follow by and by.

        Raises:
            InvalidRequestError: a number below 0.
            BatonClientError: the call failed, or a pool may not have so many.
        """
        request = scale_request(targets)
        with call_errors(self._connection):
            return convert.targets_from_proto(self._stub.Scale(request, timeout=timeout_s, metadata=self._metadata))

    def health(self, service: str = "", timeout_s: float | None = None) -> tuple[bool, str]:
        """Whether the server answers that it serves, and the reason that it gives; see `cluster.client.health`.

        Raises:
            BatonClientError: the call failed.
        """
        with call_errors(self._connection):
            return check(self._channel, service, timeout_s)

    def close(self) -> None:
        """Cancel what is going on and close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
