"""Runs the application where the configuration says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn

from cluster.config.schema import MetricsConfig
from cluster.live.answer import Responder
from cluster.server.address import bind, is_loopback, join, reachable
from cluster.server.connections import connections_of, raise_file_limit
from cluster.server.host_connections import HostConnections
from cluster.server.http_protocol import bounded_http
from cluster.server.pages.asgi import LOOPBACK_NAMES, application
from cluster.server.uvicorn_server import UvicornServer
from workers.errors import ConfigError

_LAST_WORDS_S = 1.0


@contextlib.asynccontextmanager
async def serve_pages(config: MetricsConfig, grpc_port: int, answers: Responder) -> AsyncIterator[str]:
    """Serve until the block ends; yields the address as a browser on this machine would write it.

    Args:
        config: where to listen. A port that is not given is the next one after the gRPC door's, or a free one where
            that is taken.
        grpc_port: of the gRPC door.
        answers: what is served.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener = _listen(config, grpc_port)
    hosts = LOOPBACK_NAMES if is_loopback(config.host) else None
    settings = uvicorn.Config(
        application(answers, hosts),
        http=bounded_http(HostConnections(*connections_of(raise_file_limit()))),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    server = UvicornServer(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        listening = asyncio.ensure_future(server.listening.wait())
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        yield f"http://{join(reachable(config.host), listener.getsockname()[1])}/"
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=_LAST_WORDS_S + 1.0)
        serving.cancel()
        listener.close()


def page_warnings(config: MetricsConfig) -> list[str]:
    """What a user who shows the page beyond this machine should know."""
    if not config.enabled or is_loopback(config.host):
        return []
    return [f"anyone who can reach {config.host} sees page and metrics, with request ids and users: see metrics.host"]


def _listen(config: MetricsConfig, grpc_port: int) -> socket.socket:
    def listen_on(port: int) -> socket.socket:
        return bind("metrics", config.host, port, "choose another metrics.port")

    if config.port is not None:
        return listen_on(config.port)
    try:
        return listen_on(grpc_port + 1)
    except (ConfigError, OverflowError):
        return listen_on(0)
