"""A port for a program that is told its number and listens there only later."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from pathlib import Path

_FIRST, _LAST = 24_000, 64_999
_DEALT_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 100


def free_port(ports: Sequence[int] | None = None) -> int:
    """A TCP port that is free on every address of this machine, and stays it until the program listens.

    It is none of those that the kernel deals out to connections, and to programs that ask for any: a program such as
    Ray's takes seconds to start, in which one of those may come to be somebody else's.

    Args:
        ports: those that may be taken; None: those beside what this machine's kernel deals out. 0 is any.

    Raises:
        OSError: none is free.
    """
    if ports is None:
        ports = ports_beside(*_dealt_out()) or [0]
    for port in random.sample(ports, min(_TRIES, len(ports))):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no port is free, of {len(ports)} from {min(ports)} to {max(ports)}")


def ports_beside(first: int, last: int) -> list[int]:
    """Ports that programs may listen on, without those from `first` to `last`, both included."""
    return [port for port in range(_FIRST, _LAST + 1) if not first <= port <= last]


def _dealt_out() -> tuple[int, int]:
    try:
        first, last = _DEALT_OUT.read_text().split()
    except OSError:  # not Linux: those that IANA has set apart
        return 49_152, 65_535
    return int(first), int(last)
