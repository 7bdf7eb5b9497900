"""Who may call, by which keys and certificates: read from where the configuration says, and the same at both doors."""

from __future__ import annotations

from dataclasses import replace

from cluster.config.home_path import home_path
from cluster.config.schema import HttpConfig, ServerConfig
from workers.errors import ConfigError

DEFAULT_HTTP_PORT = 8000


def with_access(server: ServerConfig) -> ServerConfig:
    """The settings with the token in `server.auth_token_file`, and with what `server.http` takes over.

    Raises:
        ConfigError: the file cannot be read, or holds no token.
    """
    server = _with_token(server)
    return replace(server, http=_with_inherited(server))


def _with_token(server: ServerConfig) -> ServerConfig:
    path = server.auth_token_file
    if path is None:
        return server
    try:
        token = home_path(path, "server.auth_token_file").read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"cannot read server.auth_token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.auth_token_file {path} holds characters that a gRPC header cannot carry") from error
    if not token:
        raise ConfigError(f"server.auth_token_file {path} is empty")
    return replace(server, auth_token=token)


def _with_inherited(server: ServerConfig) -> HttpConfig:
    """A door that nobody has said anything of is not opened wider than the other one."""
    http = server.http
    if http.port is None:
        http = replace(http, port=0 if server.port == 0 else DEFAULT_HTTP_PORT)
    if http.api_keys is None and server.auth_token is not None:
        http = replace(http, api_keys=(server.auth_token,))
    if http.tls_cert is None and server.tls_cert is not None:
        http = replace(http, tls_cert=server.tls_cert, tls_key=server.tls_key)
        http = replace(http, tls_client_ca=http.tls_client_ca or server.tls_client_ca)
    return http
