"""Where the server listens: address, TLS, and what is wrong with them, found out before a model is loaded."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from pathlib import Path

import grpc

from cluster.config.schema import ServerConfig
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


def listen(server: grpc.aio.Server, config: ServerConfig) -> tuple[str, int]:
    """Have the server listen where the configuration says.

    Returns:
        host:port as a client on this machine would write it, and the port.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file is missing or wrong.
    """
    address = _join(config.host, config.port)
    credentials = None if config.tls_cert is None else _reloading_credentials(config)
    try:
        port: int = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        _probe(config)
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    return _join(_reachable(config.host), port), port


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
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)


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
