"""Paths that a user writes."""

from __future__ import annotations

from pathlib import Path

from workers.errors import ConfigError


def home_path(text: str, setting: str) -> Path:
    """A path in which ~ and ~NAME are home folders.

    Raises:
        ConfigError: nobody here has that name.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting} is {text!r:.200}: {error}") from error
