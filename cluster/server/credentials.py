"""The credentials that a server takes, by its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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


def _read(path: str) -> tuple[Credential, ...]:
    try:
        return parse_credentials(Path(path).expanduser().read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigError(f"cannot read server.auth_token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.auth_token_file {path} holds characters that a gRPC header cannot carry") from error
    except ConfigError as error:
        raise ConfigError(f"server.auth_token_file {path}: {error}") from error
