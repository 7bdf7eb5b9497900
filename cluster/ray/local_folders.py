"""The folders of this machine that a Ray started here writes to, looked at before it is started."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from workers.errors import ConfigError

_SOCKET_BYTES = 107
"""The longest path of a Unix socket (sys/un.h: 108 with the zero at the end)."""
_LONGEST_IN_SESSION = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Behind the temporary folder, with the largest process id that Linux gives."""


def check_temporary_folder(folder: Path) -> None:
    """Refuse a temporary folder in which Ray could not make its sockets.

    Raises:
        ConfigError: it cannot be written to, or its name is too long.
    """
    size = len(os.fsencode(folder)) + len(_LONGEST_IN_SESSION)
    if size > _SOCKET_BYTES:
        most = _SOCKET_BYTES - len(_LONGEST_IN_SESSION)
        raise ConfigError(
            f"the temporary folder {folder} has {len(os.fsencode(folder))} bytes, at most {most} leave room for Ray's "
            "sockets in it; set RAY_TMPDIR to a shorter one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to the temporary folder {folder}: {error.strerror}; set RAY_TMPDIR to another one"
        ) from error


def make_auth_token(home: Path) -> None:
    """Make the token that Ray's processes ask each other for, if there is none, for its owner's eyes alone.

    Ray itself would make it readable for everyone on the machine.

    Raises:
        ConfigError: it cannot be written.
    """
    path = home / ".ray" / "auth_token"
    try:
        if path.exists():
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        return  # another process was faster
    except OSError as error:
        raise ConfigError(
            f"cannot write Ray's token {path}: {error.strerror}; set HOME to a folder that can be written to, or put "
            "a token in RAY_AUTH_TOKEN"
        ) from error
