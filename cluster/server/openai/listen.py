"""Where the HTTP server listens: found out before a model is loaded."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from cluster.config.schema import HttpConfig
from cluster.server.address import bind, is_loopback, tls_context
from cluster.server.reloaded import Reloaded

SECTION = "server.http"
_HINT = f"choose another with --http-port, or do without by --set {SECTION}.enabled=false"


def check_http(config: HttpConfig) -> None:
    """Find out early whether the server can listen where it is told to.

    Raises:
        ConfigError: the address cannot be listened on, or a TLS file is missing or wrong.
    """
    tls_of(config)
    open_socket(config).close()


def open_socket(config: HttpConfig) -> socket.socket:
    """A socket that is bound where the configuration says.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    return bind(SECTION, config.host, config.port or 0, _HINT)


def tls_of(config: HttpConfig) -> Callable[..., ssl.SSLContext] | None:
    """What makes the TLS context, in the form that uvicorn takes; None: there is no TLS.

    The certificate that a new connection is shown is read again when its files change.

    Raises:
        ConfigError: a file cannot be read, or holds no certificate with its key.
    """
    if config.tls_cert is None:
        return None
    cert, key, client_ca = config.tls_cert, str(config.tls_key), config.tls_client_ca
    paths = [path for path in (cert, key, client_ca) if path is not None]
    current = Reloaded("the HTTP server's TLS certificate", paths, lambda: tls_context(SECTION, cert, key, client_ca))

    def show_current(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = current()

    first = tls_context(SECTION, cert, key, client_ca)
    first.sni_callback = show_current  # called in every handshake, whether the client names a server or not
    return lambda *_: first


def http_exposure_warnings(config: HttpConfig) -> list[str]:
    """What a user who listens beyond this machine should know."""
    if not config.enabled or is_loopback(config.host):
        return []
    warnings = []
    where = f"{config.host}:{config.port}"
    if config.api_keys is None and config.tls_client_ca is None:
        warnings.append(f"anyone who can reach {where} can use the service by HTTP: set {SECTION}.api_keys")
    if config.tls_cert is None:
        warnings.append(f"prompts{' and keys' if config.api_keys else ''} travel unencrypted: set {SECTION}.tls_cert")
    return warnings
