"""Where the gRPC server listens: found out before a model is loaded."""

from __future__ import annotations

import asyncio

import grpc

from cluster.config.schema import ServerConfig
from cluster.server.address import bind, is_loopback, join, reachable, read_file, tls_context
from cluster.server.credentials import credentials_of
from cluster.server.reloaded import Reloaded
from workers.errors import ConfigError


async def check_server(config: ServerConfig) -> None:
    """Find out early, before a model is loaded, whether `start_server` can listen where it is told to.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file or the token is missing or wrong.
    """
    check_access(config)
    await asyncio.to_thread(_probe, config)


def check_access(config: ServerConfig) -> None:
    """Refuse TLS files and tokens that cannot be used.

    Raises:
        ConfigError: one is missing or wrong.
    """
    if config.tls_cert is not None:
        _certificates(config)
    credentials_of(config)


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
    credentials = None if config.tls_cert is None else _reloading_credentials(config)
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


def _reloading_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """Certificates that are read again when their files change; connections that are there keep theirs."""
    paths = [path for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path is not None]
    current = Reloaded("the TLS certificate", paths, lambda: _certificates(config))
    handed = current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Asked for by gRPC before each handshake, in a thread of its own; None: no change."""
        nonlocal handed
        before, handed = handed, current()
        return None if handed is before else handed

    return grpc.dynamic_ssl_server_credentials(
        handed, changed, require_client_authentication=bool(config.tls_client_ca)
    )


def _certificates(config: ServerConfig) -> grpc.ServerCertificateConfiguration:
    tls_context("server", str(config.tls_cert), str(config.tls_key), config.tls_client_ca)
    cert, key = read_file("server.tls_cert", config.tls_cert), read_file("server.tls_key", config.tls_key)
    client_ca = None if config.tls_client_ca is None else read_file("server.tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)
