"""Starts the HTTP server in the event loop of its caller, and stops it gracefully."""

from __future__ import annotations

import asyncio

import uvicorn

from cluster.api import Engine, ModelInfo
from cluster.config.schema import ServerConfig
from cluster.gateway.readiness import WELL, Health
from cluster.generation.text_generation import Generation
from cluster.server.address import join, reachable
from cluster.server.connections import connections_of, raise_file_limit
from cluster.server.credentials import http_credentials_of
from cluster.server.host_connections import HostConnections
from cluster.server.http_protocol import bounded_http
from cluster.server.openai.app import build_app
from cluster.server.openai.door import Door, Served
from cluster.server.openai.listen import open_socket, tls_of
from cluster.server.uvicorn_server import UvicornServer

_LAST_WORDS_S = 1
"""For what calls have already been answered to reach their clients."""
_KEEP_ALIVE_S = 60
"""Longer than clients let a connection idle, so that none is closed under a request."""
_BACKLOG = 2048


class HttpServer:
    """A server that listens: alive, and not ready before `serve`.

    Attributes:
        url: as a client on this machine would write it; empty before `open`.
        port: that it listens on.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.url, self.port = "", 0
        self._config = config.http
        self._door = Door(min(config.default_timeout_s, config.max_timeout_s))
        self._connections = HostConnections(*connections_of(raise_file_limit()))
        self._app = build_app(config.http, self._door, http_credentials_of(config))
        self._uvicorn: UvicornServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Listen, and answer whoever asks for health.

        Raises:
            ConfigError: the address cannot be listened on, or a TLS file or a key is missing or wrong.
        """
        tls = tls_of(self._config)
        bound = open_socket(self._config)
        self.port = bound.getsockname()[1]
        self.url = f"{'http' if tls is None else 'https'}://{join(reachable(self._config.host), self.port)}"
        self._uvicorn = UvicornServer(
            uvicorn.Config(
                self._app,
                http=bounded_http(self._connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
                ssl_context_factory=tls,
            )
        )
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[bound]))
        await self._uvicorn.listening.wait()
        if not self._uvicorn.started:
            await serving
        self._tasks = [serving, *(asyncio.create_task(each.run()) for each in (self._door.pacer, self._door.unread))]

    async def starting(self, step: str) -> None:
        """Tell who asks what the start is at; once it serves, that is no matter."""
        self._door.starting(step)

    async def serve(self, generation: Generation, engine: Engine, model_info: ModelInfo, found: Health = WELL) -> None:
        """Answer all endpoints from now on; `found` is how the service is, until the next `report`."""
        self._door.serve(Served(generation, engine, model_info), found)

    async def report(self, found: Health) -> None:
        """How the service is, for those who ask."""
        if not self._door.draining:
            self._door.health = found

    @property
    def num_calls(self) -> int:
        """Calls of new work that are under way."""
        return self._door.gate.num_calls

    async def drain(self, timeout_s: float) -> int:
        """Not ready any more: refuse new work with 503 and its reason, and wait for the calls under way.

        Returns:
            Calls that are still under way after `timeout_s` seconds.
        """
        self._door.drain("the service is shutting down")
        await self._door.gate.empty(timeout_s)
        return self._door.gate.num_calls

    async def stop(self, grace_s: float = 5.0) -> None:
        """Drain for `grace_s` seconds, end what is left with 503, and close all connections."""
        if await self.drain(grace_s):
            self._door.gate.end_calls()
        if self._uvicorn is None:
            return
        self._uvicorn.should_exit = True
        serving, *looking = self._tasks
        for task in looking:
            task.cancel()
        await serving
        self._uvicorn = None


async def start_http_server(
    config: ServerConfig, generation: Generation, engine: Engine, model_info: ModelInfo
) -> HttpServer:
    """Start serving at once.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file or a key is missing or wrong.
    """
    server = HttpServer(config)
    await server.open()
    await server.serve(generation, engine, model_info)
    return server
