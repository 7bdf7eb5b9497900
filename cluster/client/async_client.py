"""The asyncio client of the service, in Baton's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from cluster.api import Explanation, ModelInfo, PoolTarget, ServerInfo, WorkerStatus
from cluster.client.connection import MAX_RESPONSE_BYTES, Connection
from cluster.client.conversations import ConversationOptions, Messages
from cluster.client.errors import call_errors
from cluster.client.health import check_async
from cluster.client.messages import GenerateChunk, chunk
from cluster.client.requests import Options, generate_request, scale_request, tokenize_request
from cluster.trace_context import outgoing
from cluster.wire import convert
from protos import baton_pb2, baton_pb2_grpc
from workers.sampling_params import SamplingParams

_OPTIONS = (("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),)


class AsyncBatonClient:
    """An asyncio client for many requests at once. Make it inside the running loop; use it in `async with`.

    Every method is that of `BatonClient`, awaited (`generate` is iterated): arguments and errors are its.

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
            grpc.aio.insecure_channel(target, _OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, _OPTIONS)
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
    ) -> AsyncIterator[GenerateChunk]:
        """Generate part by part. Closing the iterator cancels the request."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        return self._generate(request, timeout_s)

    async def _generate(
        self, request: baton_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncIterator[GenerateChunk]:
        with call_errors(self._connection):
            call = self._stub.Generate(request, timeout=timeout_s, metadata=[*self._metadata, *outgoing()])
            try:
                async for response in call:
                    yield chunk(response)
            finally:
                call.cancel()

    async def generate_once(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> GenerateChunk:
        """Generate and return the answer whole."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with call_errors(self._connection):
            metadata = [*self._metadata, *outgoing()]
            return chunk(await self._stub.GenerateOnce(request, timeout=timeout_s, metadata=metadata))

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        chat: Messages | None = None,
        timeout_s: float | None = None,
        **options: Unpack[ConversationOptions],
    ) -> list[int]:
        """Token ids of exactly one of `prompt` and `chat`."""
        request = tokenize_request(prompt, chat, **options)
        with call_errors(self._connection):
            response = await self._stub.Tokenize(request, timeout=timeout_s, metadata=self._metadata)
        return list(response.token_ids)

    async def model_info(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model."""
        request = baton_pb2.GetModelInfoRequest()
        with call_errors(self._connection):
            response = await self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.model_info_from_proto(response)

    async def server_info(self, timeout_s: float | None = None) -> ServerInfo:
        """The program that serves."""
        request = baton_pb2.GetServerInfoRequest()
        with call_errors(self._connection):
            response = await self._stub.GetServerInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.server_info_from_proto(response)

    async def explain(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Explanation:
        """Where the request would go if it came now; nothing is generated."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with call_errors(self._connection):
            response = await self._stub.Explain(request, timeout=timeout_s, metadata=self._metadata)
        return convert.explanation_from_proto(response)

    async def workers(self, timeout_s: float | None = None) -> list[WorkerStatus]:
        """All workers, prefill first."""
        request = baton_pb2.ListWorkersRequest()
        with call_errors(self._connection):
            response = await self._stub.ListWorkers(request, timeout=timeout_s, metadata=self._metadata)
        return convert.workers_from_proto(response.workers)

    async def scale(self, targets: Mapping[str, int], timeout_s: float | None = None) -> list[PoolTarget]:
        """Have pools grow or shrink to so many workers, by role, and return all targets; they follow by and by."""
        request = scale_request(targets)
        with call_errors(self._connection):
            response = await self._stub.Scale(request, timeout=timeout_s, metadata=self._metadata)
        return convert.targets_from_proto(response)

    async def health(self, service: str = "", timeout_s: float | None = None) -> tuple[bool, str]:
        """Whether the server answers that it serves, and the reason that it gives."""
        with call_errors(self._connection):
            return await check_async(self._channel, service, timeout_s)

    async def close(self) -> None:
        """Cancel what is going on and close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
