"""Kernel libraries, imported when a layer is made and not before."""

from __future__ import annotations

import importlib
from typing import Any

from attention.errors import AttentionBackendError
from attention.platform import PACKAGES


def load_library(package: str, backend: str, module: str | None = None) -> Any:
    """Import a kernel library.

    Args:
        package: its name in `PACKAGES`.
        backend: who needs it, for the message.
        module: a module of it; None: the one in `PACKAGES`.

    Raises:
        AttentionBackendError: it is not installed, or cannot be imported here.
    """
    known, distribution = PACKAGES[package]
    try:
        return importlib.import_module(module or known)
    except Exception as error:  # one that was built for another PyTorch raises OSError, or whatever it likes
        raise AttentionBackendError(f"{backend} needs {distribution}, which cannot be imported: {error}") from error
