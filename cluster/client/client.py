"""Clients of the service, blocking and asynchronous, in Baton's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from cluster.api import Explanation, ModelInfo, PoolTarget, ServerInfo, WorkerStatus
from cluster.client.health import check
from cluster.client.messages import (
    GenerateChunk,
    Messages,
    Options,
    chunk,
    generate_request,
    scale_request,
    tokenize_request,
)
from cluster.wire import convert
from cluster.wire.auth import bearer
from cluster.wire.retry_after import RETRY_AFTER_KEY
from protos import baton_pb2, baton_pb2_grpc
from workers.errors import BatonError, ConfigError
from workers.sampling_params import SamplingParams

DEFAULT_ADDRESS = "127.0.0.1:50051"
_MAX_RESPONSE_BYTES = 64 * 2**20
_OPTIONS = (("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),)
_NOT_CONNECTED = (
    "failed to connect",
    "dns resolution failed",
    "connections to all backends failing",
    "endpoint closing",
)


class BatonClientError(BatonError):
    """A call failed; the text is the server's, or says why there was no answer.

    Attributes:
        status: the gRPC status.
        retry_after_s: seconds after which the server expects to have room; None where it did not say.
    """

    def __init__(self, status: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Connection:
    """Where a server is and how to talk to it.

    Attributes:
        address: host:port.
        tls_ca: PEM file with the certificates to trust; given, it turns TLS on.
        tls_cert: PEM file with this client's own certificate, if the server asks for one.
        tls_key: PEM file with its key.
        token: bearer token.
    """

    address: str = DEFAULT_ADDRESS
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token: str | None = None


class BatonClient:
    """A blocking client; threads may share one. Close it, or use it in a `with` statement.

    Raises:
        ConfigError: a TLS file cannot be read, or the token cannot be sent.
    """

    def __init__(self, connection: Connection | None = None) -> None:
        self._connection = connection or Connection()
        address, credentials = self._connection.address, _credentials(self._connection)
        self._channel = (
            grpc.insecure_channel(address, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, _OPTIONS)
        )
        self._stub = baton_pb2_grpc.BatonStub(self._channel)
        self._metadata = _metadata(self._connection)

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

        Closing the iterator cancels the request. `timeout_s` is the deadline of all of it. What else can be asked for
        is in `Options`.

        Raises:
            InvalidRequestError: the request cannot be put on the wire.
            BatonClientError: the call failed.
        """
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with _errors(self._connection):
            call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
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
        with _errors(self._connection):
            return chunk(self._stub.GenerateOnce(request, timeout=timeout_s, metadata=self._metadata))

    def tokenize(
        self, prompt: str | None = None, *, chat: Messages | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """Token ids of exactly one of `prompt` and `chat`. Errors as in `generate`."""
        request = tokenize_request(prompt, chat)
        with _errors(self._connection):
            return list(self._stub.Tokenize(request, timeout=timeout_s, metadata=self._metadata).token_ids)

    def model_info(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model.

        Raises:
            BatonClientError: the call failed.
        """
        request = baton_pb2.GetModelInfoRequest()
        with _errors(self._connection):
            response = self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.model_info_from_proto(response)

    def server_info(self, timeout_s: float | None = None) -> ServerInfo:
        """The program that serves. Errors as in `model_info`."""
        request = baton_pb2.GetServerInfoRequest()
        with _errors(self._connection):
            response = self._stub.GetServerInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.server_info_from_proto(response)

    def explain(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> Explanation:
        """Where the request would go if it came now; nothing is generated. Arguments and errors as in `generate`."""
        request = generate_request(prompt, token_ids, chat, sampling, model=model)
        with _errors(self._connection):
            response = self._stub.Explain(request, timeout=timeout_s, metadata=self._metadata)
        return convert.explanation_from_proto(response)

    def workers(self, timeout_s: float | None = None) -> list[WorkerStatus]:
        """All workers, prefill first.

        Raises:
            BatonClientError: the call failed.
        """
        request = baton_pb2.ListWorkersRequest()
        with _errors(self._connection):
            response = self._stub.ListWorkers(request, timeout=timeout_s, metadata=self._metadata)
        return convert.workers_from_proto(response.workers)

    def scale(self, targets: Mapping[str, int], timeout_s: float | None = None) -> list[PoolTarget]:
        """Have pools grow or shrink to so many workers, by role, and return all targets; they follow by and by.

        Raises:
            InvalidRequestError: a number below 0.
            BatonClientError: the call failed, or a pool may not have so many.
        """
        request = scale_request(targets)
        with _errors(self._connection):
            return convert.targets_from_proto(self._stub.Scale(request, timeout=timeout_s, metadata=self._metadata))

    def health(self, service: str = "", timeout_s: float | None = None) -> tuple[bool, str]:
        """Whether the server answers that it serves, and the reason that it gives; see `cluster.client.health`.

        Raises:
            BatonClientError: the call failed.
        """
        with _errors(self._connection):
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


class AsyncBatonClient:
    """An asyncio client for many requests at once. Make it inside the running loop; use it in `async with`.

    Raises:
        ConfigError: a TLS file cannot be read, or the token cannot be sent.
    """

    def __init__(self, connection: Connection | None = None) -> None:
        self._connection = connection or Connection()
        address, credentials = self._connection.address, _credentials(self._connection)
        self._channel = (
            grpc.aio.insecure_channel(address, _OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, _OPTIONS)
        )
        self._stub = baton_pb2_grpc.BatonStub(self._channel)
        self._metadata = _metadata(self._connection)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Messages | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[GenerateChunk]:
        """Generate part by part. Arguments, cancelling and errors as in `BatonClient.generate`."""
        request = generate_request(prompt, token_ids, chat, sampling, **options)
        with _errors(self._connection):
            call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
            try:
                async for response in call:
                    yield chunk(response)
            finally:
                call.cancel()

    async def model_info(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model. Errors as in `BatonClient.model_info`."""
        request = baton_pb2.GetModelInfoRequest()
        with _errors(self._connection):
            response = await self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata)
        return convert.model_info_from_proto(response)

    async def workers(self, timeout_s: float | None = None) -> list[WorkerStatus]:
        """All workers. Errors as in `BatonClient.workers`."""
        request = baton_pb2.ListWorkersRequest()
        with _errors(self._connection):
            response = await self._stub.ListWorkers(request, timeout=timeout_s, metadata=self._metadata)
        return convert.workers_from_proto(response.workers)

    async def scale(self, targets: Mapping[str, int], timeout_s: float | None = None) -> list[PoolTarget]:
        """Have pools grow or shrink. Arguments and errors as in `BatonClient.scale`."""
        request = scale_request(targets)
        with _errors(self._connection):
            response = await self._stub.Scale(request, timeout=timeout_s, metadata=self._metadata)
        return convert.targets_from_proto(response)

    async def close(self) -> None:
        """Cancel what is going on and close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _credentials(connection: Connection) -> grpc.ChannelCredentials | None:
    if connection.tls_ca is None:
        if connection.tls_cert is not None or connection.tls_key is not None:
            raise ConfigError("a client certificate needs TLS: give the server's CA file too")
        return None
    if (connection.tls_cert is None) != (connection.tls_key is None):
        raise ConfigError("a client certificate and its key must be given together")
    paths = (connection.tls_ca, connection.tls_key, connection.tls_cert)
    try:
        return grpc.ssl_channel_credentials(*(None if path is None else Path(path).read_bytes() for path in paths))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error


def _metadata(connection: Connection) -> list[tuple[str, str]]:
    return [] if connection.token is None else [bearer(connection.token)]


@contextmanager
def _errors(connection: Connection) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _client_error(connection, error) from error


def _client_error(connection: Connection, error: Any) -> BatonClientError:
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE and details.lower().startswith(_NOT_CONNECTED):
        tls = "with TLS" if connection.tls_ca else "without TLS"
        return BatonClientError(
            status,
            f"cannot reach a Baton server at {connection.address} ({tls}): "
            "is `baton up` running there, and does it listen on that address?",
        )
    retry_after_ms = dict(error.trailing_metadata() or ()).get(RETRY_AFTER_KEY)
    return BatonClientError(
        status,
        f"{status.name}: {details}" if details else status.name,
        None if retry_after_ms is None else float(retry_after_ms) / 1e3,
    )
