"""Kernel libraries that are installed and cannot be used: found by importing them, each reported once by its name."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType

from attention.platform import PACKAGES

logger = logging.getLogger(__name__)

_FOUND: dict[str, str] = {}


def import_fault(
    package: str, module: str | None = None, attributes: tuple[str, ...] = (), name: str | None = None
) -> str | None:
    """Why an installed kernel library is of no use; None when nothing is wrong with it. Imports it; looks once.

    Args:
        package: its name in `PACKAGES`.
        module: the module that holds its kernels; None: the one in `PACKAGES`.
        attributes: what that module must have, and not as False or None.
        name: what is reported as broken; None: the distribution.
    """
    known, distribution = PACKAGES[package]
    fault = _fault(module or known, attributes)
    if fault is not None:
        report_broken(name or distribution, fault)
    return fault


def report_broken(name: str, reason: str) -> None:
    """Say once, as a warning, that something installed cannot be used, and remember it."""
    if name not in _FOUND:
        _FOUND[name] = reason
        logger.warning("%s is installed and cannot be used: %s", name, reason)


def broken_libraries() -> Mapping[str, str]:
    """What was found so far in this process: name to reason."""
    return MappingProxyType(_FOUND)


def in_a_line(error: Exception) -> str:
    """Type and first line of what a library has raised, which may be whatever it likes, of any length."""
    message = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {message:.200}"


def look_again() -> None:
    """Forget what was found, after something was installed."""
    _FOUND.clear()
    _fault.cache_clear()


@functools.cache
def _fault(module: str, attributes: tuple[str, ...]) -> str | None:
    try:
        library = importlib.import_module(module)
    except Exception as error:  # one that was built for another PyTorch raises OSError, or whatever it likes
        return f"{module} cannot be imported: {in_a_line(error)}"
    missing = [name for name in attributes if not getattr(library, name, False)]
    return f"{module} is there without {', '.join(missing)}" if missing else None
