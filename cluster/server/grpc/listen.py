"""Where the gRPC server listens: found out before a model is loaded."""

from __future__ import annotations

import asyncio

import grpc

from cluster.config.schema import ServerConfig
from cluster.server.address import bind, is_loopback, join, reachable, read_file, tls_context
from cluster.wire.auth import bearer
from workers.errors import ConfigError


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
    if is_loopback(config.host):
        return []
    warnings = []
    if config.auth_token is None and config.tls_client_ca is None:
        warnings.append(f"anyone who can reach {config.host}:{config.port} can use the service: set server.auth_token")
    if config.tls_cert is None:
        warnings.append(
            f"prompts{' and the token' if config.auth_token else ''} travel unencrypted: set server.tls_cert"
        )
    return warnings


def listen(server: grpc.aio.Server, config: ServerConfig) -> tuple[str, int]:
    """Have the server listen where the configuration says.

    Returns:
        host:port as a client on this machine would write it, and the port.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file is missing or wrong.
    """
    address = join(config.host, config.port)
    credentials = None if config.tls_cert is None else _credentials(config)
    try:
        port: int = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        _probe(config)
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    return join(reachable(config.host), port), port


def _probe(config: ServerConfig) -> None:
    """Bind the address once, for the reason why it cannot be bound, which gRPC does not tell."""
    bind("server", config.host, config.port, "choose another with --port").close()


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    cert, key = read_file("server.tls_cert", config.tls_cert), read_file("server.tls_key", config.tls_key)
    client_ca = None if config.tls_client_ca is None else read_file("server.tls_client_ca", config.tls_client_ca)
    tls_context("server", str(config.tls_cert), str(config.tls_key), config.tls_client_ca)
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)
