"""The credentials that a server takes, by its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.config.home_path import home_path
from cluster.config.schema import ServerConfig
from cluster.server.reloaded import Reloaded
from cluster.wire.auth import Credential, parse_credentials
from workers.errors import ConfigError

Credentials = Callable[[], Sequence[Credential]]


def credentials_of(config: ServerConfig) -> Credentials | None:
    """Those that are good at the moment of the call; None: every call is.

    Raises:
        ConfigError: the file or a token in it is wrong.
    """
    path, token = config.auth_token_file, config.auth_token
    if path is not None:
        return Reloaded("server.auth_token_file", [path], lambda: _read(path))
    if token is None:
        return None
    only = (Credential(token),)
    return lambda: only


def http_credentials_of(config: ServerConfig) -> Credentials | None:
    """Those of the HTTP server: keys of its own, else the gRPC server's.

    Raises:
        ConfigError: a key is wrong, or the file or a token in it.
    """
    keys = config.http.api_keys
    if keys is None or keys == (config.auth_token,):
        return credentials_of(config)
    own = tuple(Credential(key) for key in keys)
    return lambda: own


def _read(path: str) -> tuple[Credential, ...]:
    try:
        return parse_credentials(home_path(path, "server.auth_token_file").read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigError(f"cannot read server.auth_token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.auth_token_file {path} holds characters that a gRPC header cannot carry") from error
    except ConfigError as error:
        raise ConfigError(f"server.auth_token_file {path}: {error}") from error
