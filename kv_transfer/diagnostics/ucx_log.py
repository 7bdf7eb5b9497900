"""Reading out of UCX's own log what carries the data, and which UCX it is.

With `LOG_EVERYTHING` in its environment a process's UCX writes a table about each kind of transfer that it meets:

    | d intra-node cfg#1                                       |
    | remote memory write by ucp_put* from host memory to host |
    +--------+-------------+-----------------------------------+
    | Range  | Description |              Config               |
    +--------+-------------+-----------------------------------+
    | 0..inf | zero-copy   | cma/memory                        |
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LOG_EVERYTHING = {"UCX_PROTO_INFO": "y", "UCX_LOG_LEVEL": "info"}

_VERSION = re.compile(r"UCX\s+INFO\s+Version (\S+)")
_CONFIG = re.compile(r"\|\s*(?:\S+ )*?(self|intra-node|inter-node) cfg#\d+\s*\|")
_TITLE = re.compile(r"\|\s*remote memory (write|read) by ucp_(?:put|get)\S* (?:from|into) (.+?)\s*\|")
_ROW = re.compile(r"\|\s*(?:\d+\.\.)?(\d+|inf)\s*\|\s*(.*?)\s*\|\s*(.*?)\s*\|")
_OPERATIONS = {"write": "WRITE", "read": "READ"}


def ucx_version(log: str) -> str | None:
    """The version that UCX gives itself."""
    found = _VERSION.search(log)
    return found[1] if found else None


def carriers(log: str, memory: str) -> dict[str, str]:
    """What carries large transfers to another process, "WRITE" and "READ", as UCX calls it, such as "cuda_ipc/cuda".

    Args:
        log: of the process that starts them.
        memory: where the data is, "cuda" or "host".

    Returns:
        Nothing for an operation that has no table.
    """
    found: dict[str, str] = {}
    for scope, operation, where, description, config in _rows(log):
        if scope != "self" and where.startswith(memory):
            found[operation] = config or description
    return found


def _rows(log: str) -> Iterator[tuple[str, str, str, str, str]]:
    """The last row, which is that of the largest transfers, of each table about remote memory."""
    scope = operation = where = ""
    last: tuple[str, str, str, str, str] | None = None
    for line in log.splitlines():
        if found := _CONFIG.search(line):
            if last is not None:
                yield last
            scope, operation, last = found[1], "", None
        elif found := _TITLE.search(line):
            operation, where = _OPERATIONS[found[1]], found[2]
        elif operation and (found := _ROW.search(line)):
            last = (scope, operation, where, found[2], found[3])
    if last is not None:
        yield last
