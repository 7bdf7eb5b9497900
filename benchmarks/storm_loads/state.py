"""What a service holds at a moment: memory, descriptors and threads of processes, blocks, and the gateway's books."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.served import Served

_IDLE_PATIENCE_S = 60.0
_LOOK_INTERVAL_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")
BOOKS = ("calls", "queued", "attempts", "booked_requests", "booked_blocks", "booked_s")
"""What must be nothing when nobody asks anything."""


async def wait_until_idle(service: Served) -> float:
    """Until nobody is served, every block is free and the books are empty; seconds that it took.

    Raises:
        TimeoutError: something stays; the text has what.
    """
    began = time.monotonic()
    while True:
        left = await _left(service)
        if not left:
            return time.monotonic() - began
        if time.monotonic() - began > _IDLE_PATIENCE_S:
            raise TimeoutError(f"after {_IDLE_PATIENCE_S:g} s there is still {left}")
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def _left(service: Served) -> dict[str, Any]:
    books = await service.ask("books")
    left = {name: books[name] for name in BOOKS if books[name]}
    blocks = blocks_missing((await service.ask("workers"))["workers"])
    return {**left, **({"blocks": blocks} if blocks else {})}


def blocks_missing(workers: list[Mapping[str, Any]]) -> int:
    """Blocks of all workers that are not free."""
    return sum(worker["load"]["total_blocks"] - worker["load"]["free_blocks"] for worker in workers)


async def state(service: Served) -> dict[str, Any]:
    """All of it; sizes in bytes."""
    processes = {"gateway": _process(service.process.pid)}
    for engine_id, pids in (await service.ask("pids")).items():
        processes[engine_id.partition(".")[0]] = _process(pids[0])
    workers = (await service.ask("workers"))["workers"]
    return {
        "processes": processes,
        "blocks_missing": blocks_missing(workers),
        "blocks_quarantined": sum(worker["load"]["quarantined_blocks"] for worker in workers),
        "engines": sorted(worker["id"] for worker in workers),
        "books": await service.ask("books"),
    }


def _process(pid: int) -> dict[str, int]:
    folder = Path("/proc") / str(pid)
    return {
        "rss": int((folder / "statm").read_text().split()[1]) * _PAGE,
        "descriptors": len(os.listdir(folder / "fd")),
        "threads": len(os.listdir(folder / "task")),
    }


def growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """Of Baton's types those of which there are more objects than before, and by how many."""
    had, has = before["books"]["objects"], after["books"]["objects"]
    return {kind: more for kind in has if (more := has[kind] - had.get(kind, 0)) > 0}
