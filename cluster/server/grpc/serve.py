"""Starts the gRPC server: access, health, reflection, the service; and stops it gracefully."""

from __future__ import annotations

import asyncio
import time

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from cluster.api import Engine, ModelInfo, ServerInfo
from cluster.config.schema import ServerConfig
from cluster.errors import StartingError
from cluster.gateway.readiness import WELL, Health
from cluster.generation.text_generation import Generation
from cluster.server.call_gate import CallGate
from cluster.server.connections import IDLE_S, connections_of, raise_file_limit
from cluster.server.credentials import credentials_of
from cluster.server.grpc.access import BearerTokenInterceptor
from cluster.server.grpc.closing import LastCalls
from cluster.server.grpc.connections import GrpcConnections
from cluster.server.grpc.errors import status_of
from cluster.server.grpc.health import HealthBoard, watches_of
from cluster.server.grpc.listen import listen
from cluster.server.grpc.reflection import enable_reflection
from cluster.server.grpc.service import SERVICE, BatonService, Terms, method_handlers
from cluster.server.grpc.wakeups import gathered_wakeups
from cluster.server.held_bytes import HeldBytes
from cluster.server.pacing import Pacer
from cluster.server.unread import UnreadStreams
from cluster.version import commit, version

MAX_REQUEST_BYTES = 32 * 2**20
"""Larger than any prompt, so that one that is too long is refused with its length and the limit, not by gRPC."""

_LAST_WORDS_S = 1.0
"""For what calls have already been answered to reach their clients."""

_HANDSHAKE_LIMIT_MS = 20_000
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # A second server on the same port must fail, not take half of the calls.
    ("grpc.so_reuseport", 0),
    # Notice clients that vanished without closing their connection, and free what they hold.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_connection_idle_ms", 1000 * IDLE_S),
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_LIMIT_MS),
    # Bursts wait here until the event loop takes them, and the service's own queue decides; gRPC would cancel them.
    ("grpc.server.max_pending_requests", 32_768),
    ("grpc.server.max_pending_requests_hard_limit", 65_536),
    ("grpc.server_max_unrequested_time_in_server", 600),
)


class Server:
    """A server that listens: alive, and not ready before `serve`.

    Args:
        config: where, and who may call.
        pacer: of its streams; None: one of its own.

    Attributes:
        address: host:port as a client on this machine would write it.
        port: that it listens on.
    """

    def __init__(self, config: ServerConfig, pacer: Pacer | None = None) -> None:
        self.address, self.port = "", 0
        self._config = config
        self._version, self._commit, self._began = version(), commit(), time.monotonic()
        self._gate = CallGate()
        self._health = HealthBoard(watches_of(config.max_concurrent_rpcs))
        self._unread = UnreadStreams()
        self._service = _Service()
        self._pacer = pacer or Pacer()
        self._looking: list[asyncio.Task[None]] = []
        self._connections = GrpcConnections(*connections_of(raise_file_limit()))
        credentials = credentials_of(config)
        self._last_calls = LastCalls()
        guards = [] if credentials is None else [BearerTokenInterceptor(credentials)]
        with gathered_wakeups(asyncio.get_running_loop()):
            self._grpc = grpc.aio.server(
                interceptors=[self._last_calls, *guards],
                options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", self._connections.most)),
                maximum_concurrent_rpcs=config.max_concurrent_rpcs,
            )

    async def open(self) -> None:
        """Listen, and answer health checks.

        Raises:
            ConfigError: the address cannot be listened on, or a TLS file or the token is missing or wrong.
        """
        self._grpc.add_generic_rpc_handlers((self._service,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if self._config.reflection:
            enable_reflection((SERVICE.full_name, health.SERVICE_NAME), self._grpc)
        self.address, self.port = listen(self._grpc, self._config)
        await self.starting("it has just begun")
        await self._grpc.start()
        looking = (self._pacer.run(), self._unread.run(), self._connections.run(self.port))
        self._looking = [asyncio.create_task(each) for each in looking]

    async def starting(self, step: str) -> None:
        """Tell who asks what the start is at; once it serves, that is no matter."""
        if self._service.handlers is not None:
            return
        self._service.step = step
        await self._health.start(str(StartingError(step)))

    async def serve(self, generation: Generation, engine: Engine, model_info: ModelInfo, found: Health = WELL) -> None:
        """Answer the service's calls from now on; `found` is how the service is, until the next `report`."""
        service = BatonService(generation, engine, model_info, self._pacer, self.info)
        times = self._config.default_timeout_s, self._config.max_timeout_s
        terms = Terms(*times, self._gate, self._unread, self._connections, HeldBytes())
        self._service.handlers = method_handlers(service, terms)
        await self._health.report(found)

    async def report(self, found: Health) -> None:
        """How the service is, for health checks."""
        await self._health.report(found)

    def info(self) -> ServerInfo:
        """Which program this is."""
        return ServerInfo(self._version, self._commit, time.monotonic() - self._began)

    @property
    def num_calls(self) -> int:
        """Calls of new work that are under way."""
        return self._gate.num_calls

    async def wait(self) -> None:
        """Until the server has stopped."""
        # Cancelling gRPC's own future would make a `stop` that comes later end at once.
        await asyncio.shield(self._grpc.wait_for_termination())

    async def drain(self, timeout_s: float) -> int:
        """Report NOT_SERVING, refuse new work with UNAVAILABLE and its reason, and wait for the calls under way.

        Returns:
            Calls that are still under way after `timeout_s` seconds.
        """
        self._gate.close()
        await self._health.drain("the service is shutting down")
        await self._gate.empty(timeout_s)
        return self._gate.num_calls

    async def stop(self, grace_s: float = 5.0) -> None:
        """Drain for `grace_s` seconds, end what is left with UNAVAILABLE, and close all connections."""
        if await self.drain(grace_s):
            self._gate.end_calls()
        for task in self._looking:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._last_calls.stop(self._grpc, _LAST_WORDS_S)


async def start_server(
    config: ServerConfig, generation: Generation, engine: Engine, model_info: ModelInfo, pacer: Pacer | None = None
) -> Server:
    """Start serving at once.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file or the token is missing or wrong.
    """
    server = Server(config, pacer)
    await server.open()
    await server.serve(generation, engine, model_info)
    return server


class _Service(grpc.GenericRpcHandler):
    """The methods of baton.v1.Baton: refused with what the start is at, until there are handlers for them."""

    def __init__(self) -> None:
        self.step = ""
        self.handlers: grpc.GenericRpcHandler | None = None
        self._prefix = f"/{SERVICE.full_name}/"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if self.handlers is not None:
            return self.handlers.service(handler_call_details)
        if not handler_call_details.method.startswith(self._prefix):
            return None
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(*status_of(StartingError(self.step)))
