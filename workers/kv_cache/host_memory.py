"""How much memory of the host a process may still take, whoever limits it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_V1_UNLIMITED = 2**60
"""Version 1 says "no limit" as the largest multiple of a page."""


class HostMemory(NamedTuple):
    """Bytes.

    Attributes:
        total: that this process and its peers in its cgroups may have together: the machine's, or the smallest limit.
        available: that could be taken now without swapping and without being killed: what is free, and what the kernel
            would give back for it, of the machine and below each limit.
    """

    total: int
    available: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory (/proc/meminfo, MemTotal and MemAvailable), and what the cgroups leave of it.

    MemFree is no measure: after an hour most of a healthy machine's memory is page cache. Limits of all cgroups above
    count, of version 2 (memory.max) and of version 1 (memory.limit_in_bytes); in what a cgroup uses, file pages that
    nobody has touched lately are as good as free, as they are to the kernel (Documentation/admin-guide/cgroup-v2.rst).

    Args:
        root: of the file system that holds proc and sys.
    """
    info = _meminfo(root)
    found = [HostMemory(info["MemTotal"], info.get("MemAvailable", info["MemFree"])), *_limits(root)]
    total = min(memory.total for memory in found)
    return HostMemory(total, max(0, min(memory.available for memory in found)))


def _meminfo(root: Path) -> dict[str, int]:
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}


def _limits(root: Path) -> list[HostMemory]:
    """What each cgroup that has a limit leaves."""
    found = []
    for folder, version in _folders(root):
        limit_file, used_file, reclaimable = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None and limit < _V1_UNLIMITED:
            found.append(HostMemory(limit, limit - used + _statistics(folder).get(reclaimable, 0)))
    return found


def _folders(root: Path) -> list[tuple[Path, int]]:
    """The folders of the memory cgroups that this process is in, from its own upwards, and their version.

    In a container the path in /proc may be the host's, and its own cgroup the mount's root: folders that are not there
    are left out.
    """
    mount, folders = root / "sys/fs/cgroup", []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops = [(top, 2) for top in (mount, mount / "unified") if (top / "cgroup.controllers").exists()]
        elif "memory" in controllers.split(","):
            tops = [(mount / "memory", 1)]
        else:
            continue
        for top, version in tops:
            own = top / path.strip("/")
            chain = [own, *own.parents]
            folders += [(folder, version) for folder in chain[: chain.index(top) + 1] if folder.is_dir()]
    return folders


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """None: there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistics(folder: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}


def cache_share(memory: HostMemory, share: float) -> int:
    """Bytes that a KV cache may take when nobody has said.

    A share of the whole and not of what is left, so that equal workers which start at the same time get equal caches;
    half of what is available at most.
    """
    return min(int(memory.total * share), memory.available // 2)
