"""Ports: where processes listen, and those that ended ones have left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def listening_ports(pids: Iterable[int]) -> set[int]:
    """TCP ports (IPv4) on which these processes listen."""
    ports: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes = {
                link[8:-1]
                for name in os.listdir(f"/proc/{pid}/fd")
                if (link := _link(f"/proc/{pid}/fd/{name}")).startswith("socket:[")
            }
            for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def free_ports(first: int, last: int) -> None:
    """Have the kernel forget connections of ended processes on these ports, which it keeps for a minute (TIME_WAIT).

    UCX does not listen on such a port before. Takes root and `ss`; where either is missing nothing happens, and a
    successor that is to have its predecessor's ports starts a minute later.
    """
    with contextlib.suppress(OSError):
        where = ["sport", ">=", f":{first}", "and", "sport", "<=", f":{last}"]
        subprocess.run(["ss", "-K", "-tan", "state", "time-wait", *where], capture_output=True, timeout=10, check=False)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
