"""Where a server listens: addresses as they are written, TLS files, and what is wrong with them."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path

from workers.errors import ConfigError


def join(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(host: str) -> str:
    """How a client on this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(section: str, host: str, port: int, hint: str) -> socket.socket:
    """A socket that is bound to the address, and does not listen yet.

    Args:
        section: of the configuration, for messages.
        host: name or address.
        port: 0 takes a free one.
        hint: what to do where somebody else has the port.

    Raises:
        ConfigError: the address cannot be bound.
    """
    address = join(host, port)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio switches Nagle's algorithm off only where it is told that this is TCP; with it a small write behind
        # another one waits for the other side's delayed acknowledgement, 40 ms.
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(target)
        except BaseException:
            bound.close()
            raise
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {address}: {section}.host {host!r}: {error.strerror}") from error
    except OSError as error:
        hint = f"; is another server running? {hint}" if port else ""
        raise ConfigError(f"cannot listen on {address}: {(error.strerror or str(error)).lower()}{hint}") from error
    return bound


def read_file(key: str, path: str | None) -> bytes:
    """The content of the file that a setting names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(str(path)).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {key} {path}: {error.strerror}") from error


def tls_context(section: str, cert: str, key: str, client_ca: str | None) -> ssl.SSLContext:
    """What a TLS server needs; with `client_ca` clients must show a certificate signed by one of its.

    Raises:
        ConfigError: a file cannot be read, or holds no certificate with its key.
    """
    for name, path in (("tls_cert", cert), ("tls_key", key), ("tls_client_ca", client_ca)):
        if path is not None:
            read_file(f"{section}.{name}", path)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        files = ", ".join(path for path in (cert, key, client_ca) if path is not None)
        raise ConfigError(
            f"the TLS files ({files}) are no certificate with its key: {error.reason or error}"
        ) from error
    return context
