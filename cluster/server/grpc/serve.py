"""Starts the gRPC server: address, TLS, token, health, reflection; and stops it gracefully."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.api import Engine, ModelInfo
from cluster.config.schema import ServerConfig
from cluster.gateway.text_generation import Generation
from cluster.server.grpc.access import BearerTokenInterceptor
from cluster.server.grpc.call_gate import CallGate
from cluster.server.grpc.service import SERVICE, BatonService, method_handlers
from cluster.wire.auth import bearer
from workers.errors import ConfigError

MAX_REQUEST_BYTES = 64 * 2**20
"""Larger than any prompt, so that one that is too long is refused with its length and the limit, not by gRPC."""

_LAST_WORDS_S = 1.0
"""For what calls have already been answered to reach their clients."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # A second server on the same port must fail, not take half of the calls.
    ("grpc.so_reuseport", 0),
    # Notice clients that vanished without closing their connection, and free what they hold.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True)
class Server:
    """A running server. `address` is host:port as a client on this machine would write it."""

    address: str
    port: int
    _grpc: grpc.aio.Server
    _health: health.aio.HealthServicer
    _gate: CallGate

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
        await self._health.enter_graceful_shutdown()
        await self._gate.empty(timeout_s)
        return self._gate.num_calls

    async def stop(self, grace_s: float = 5.0) -> None:
        """Drain for `grace_s` seconds, end what is left with UNAVAILABLE, and close all connections."""
        if await self.drain(grace_s):
            self._gate.end_calls()
        await self._grpc.stop(_LAST_WORDS_S)


async def start_server(config: ServerConfig, generation: Generation, engine: Engine, model_info: ModelInfo) -> Server:
    """Start serving.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file or the token is missing or wrong.
    """
    interceptors = [] if config.auth_token is None else [BearerTokenInterceptor(config.auth_token)]
    server = grpc.aio.server(
        interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=config.max_concurrent_rpcs
    )
    gate = CallGate()
    service = BatonService(generation, engine, model_info)
    server.add_generic_rpc_handlers((method_handlers(service, config.default_timeout_s, gate),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if config.reflection:
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    port = _listen(server, config)
    await server.start()
    for name in ("", SERVICE.full_name):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Server(_join(_reachable(config.host), port), port, server, health_servicer, gate)


async def check_server(config: ServerConfig) -> None:
    """Find out early, before a model is loaded, whether `start_server` can listen where it is told to.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file or the token is missing or wrong.
    """
    if config.tls_cert is not None:
        _credentials(config)
    if config.auth_token is not None:
        bearer(config.auth_token)
    await asyncio.to_thread(_probe, config)


def exposure_warnings(config: ServerConfig) -> list[str]:
    """What a user who listens beyond this machine should know."""
    if _is_loopback(config.host):
        return []
    warnings = []
    if config.auth_token is None and config.tls_client_ca is None:
        warnings.append(f"anyone who can reach {config.host}:{config.port} can use the service: set server.auth_token")
    if config.tls_cert is None:
        warnings.append(
            f"prompts{' and the token' if config.auth_token else ''} travel unencrypted: set server.tls_cert"
        )
    return warnings


def _listen(server: grpc.aio.Server, config: ServerConfig) -> int:
    address = _join(config.host, config.port)
    credentials = None if config.tls_cert is None else _credentials(config)
    try:
        port: int = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        _probe(config)
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    return port


def _probe(config: ServerConfig) -> None:
    """Bind the address once, for the reason why it cannot be bound, which gRPC does not tell."""
    address = _join(config.host, config.port)
    try:
        family, kind, _, _, target = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {address}: server.host {config.host!r}: {error.strerror}") from error
    except OSError as error:
        hint = "; is another server running? choose another with --port" if config.port else ""
        raise ConfigError(f"cannot listen on {address}: {(error.strerror or str(error)).lower()}{hint}") from error


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    cert, key = _read("server.tls_cert", config.tls_cert), _read("server.tls_key", config.tls_key)
    client_ca = None if config.tls_client_ca is None else _read("server.tls_client_ca", config.tls_client_ca)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(config.tls_cert), str(config.tls_key))
        if client_ca is not None:
            context.load_verify_locations(config.tls_client_ca)
    except ssl.SSLError as error:
        files = f"{config.tls_cert}, {config.tls_key}" + (f", {config.tls_client_ca}" if client_ca else "")
        raise ConfigError(
            f"the TLS files ({files}) are no certificate with its key: {error.reason or error}"
        ) from error
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


def _read(key: str, path: str | None) -> bytes:
    try:
        return Path(str(path)).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {key} {path}: {error.strerror}") from error


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
