"""Processes that are known by a mark in their environment, which whatever they start inherits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

MARKER = "LOOPBACK_MACHINE"
"""Every process of a pretended machine has it in its environment, with the folder of the machine as value."""


def running(homes: Sequence[str]) -> dict[int, str]:
    """Processes of the machines with these folders: process id to command line."""
    wanted = {f"{MARKER}={home}".encode() for home in homes}
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted.intersection((path / "environ").read_bytes().split(b"\0")):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a process that has ended and was not waited for has none
                    found[int(path.name)] = command
    return found
