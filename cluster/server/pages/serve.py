"""Runs the application where the configuration says."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn

from cluster.config.schema import MetricsConfig
from cluster.live.answer import Responder
from cluster.server.pages.asgi import LOOPBACK_NAMES, application
from workers.errors import ConfigError

_LAST_WORDS_S = 1.0


class _Server(uvicorn.Server):
    """Leaves signals to its process, and says when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.startup`."""
        await super().startup(sockets)
        self.answers.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        answers_now = asyncio.ensure_future(server.answers.wait())
        await asyncio.wait({serving, answers_now}, return_when=asyncio.FIRST_COMPLETED)
        yield f"http://{_join(config.host, listener.getsockname()[1])}/"
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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(config: MetricsConfig, grpc_port: int) -> socket.socket:
    given = config.port
    if given is not None:
        return _bound(config.host, given)
    try:
        return _bound(config.host, grpc_port + 1)
    except (ConfigError, OverflowError):
        return _bound(config.host, 0)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
        except OSError:
            listener.close()
            raise
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {host}:{port}: metrics.host {host!r}: {error.strerror}") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another metrics.port") from error
    return listener


def _join(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"
