"""One cell: clients ask, a handoff comes to the gate, somebody is hurt, and it is watched what becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.faults.cells import FREEZE_S, Cell
from benchmarks.faults.clients import Clients, Tally
from benchmarks.faults.harms import runs
from benchmarks.faults.ports import listening_ports
from benchmarks.faults.stage import Stage
from benchmarks.free_port import free_port

_LOOK_INTERVAL_S = 0.02
_PATIENCE_S = 120.0
_FREE_INTERVAL_S = 0.25
_UNDER_WAY = 16
"""Right answers before somebody is hurt, and after all is well again."""


class _Watch:
    """What the gateway says of its workers since somebody was hurt."""

    def __init__(self, stage: Stage, hurt: list[str], since: float) -> None:
        self._stage, self._hurt, self._since = stage, set(hurt), since
        self.num_workers = 0
        self._freed_at = 0.0
        self.noticed_s: float | None = None
        self.noticed_as = ""
        self.replaced: set[str] = set()

    async def look(self) -> bool:
        """Whether all workers are ready, none of them one that is lost, and reach each other."""
        if time.monotonic() >= self._freed_at + _FREE_INTERVAL_S:
            self._freed_at = time.monotonic()
            await self._stage.free_ports()
        try:
            said = await self._stage.service.ask("workers")
        except OSError:
            return False
        for at, engine_id, state in said["changes"]:
            if at >= self._since and state in ("lost", "stalled"):
                self._note(at, engine_id, state)
        for worker in said["workers"]:
            if worker["unreachable"] and self._hurt & {worker["id"], *worker["unreachable"]}:
                self._note(said["now"], worker["id"], "the connection broke")
        ready = [worker for worker in said["workers"] if worker["state"] == "ready" and not worker["unreachable"]]
        return len(ready) >= self.num_workers and not self.replaced & {worker["id"] for worker in ready}

    def _note(self, at: float, engine_id: str, what: str) -> None:
        if what == "lost":
            self.replaced.add(engine_id)
        if self.noticed_s is None and (engine_id in self._hurt or what == "the connection broke" or not self._hurt):
            self.noticed_s, self.noticed_as = at - self._since, what


async def run_cell(stage: Stage, cell: Cell, clients: Clients) -> dict[str, Any]:
    """Run it; what came of it, see `benchmarks.kill_matrix`."""
    clients.address, clients.tally = stage.address, Tally()
    async with clients.asking():
        await _until(lambda: _true(clients.tally.right >= _UNDER_WAY), "the clients have answers")
        num_workers = len(await stage.workers())
        engines = await stage.engines_on_hurt_node() if cell.target == "node" else []
        before = await stage.service.ask("pids")
        log_before = len(stage.service.process.text())
        stage.gate.arm(cell.phase, engines)
        await _until(lambda: _true(stage.gate.reached() is not None), "a handoff is at the gate", 0.001)
        hurt, pids = await stage.victims(stage.gate.reached() or {})
        old_ports = listening_ports(pids)
        tally = clients.tally = Tally()
        since = time.monotonic()
        reached = stage.hurt(cell.harm, pids, [pid for ranks in before.values() for pid in ranks])
        stage.gate.open()
        watch = _Watch(stage, hurt, since)
        watch.num_workers = num_workers
        old_address, gone_s, still_frozen = stage.address, None, 0
        if cell.harm == "frozen":
            gone_s, still_frozen = await _freeze(stage, cell, watch, pids, since)
        if cell.target == "gateway" and cell.harm == "killed":
            await stage.start(int(old_address.rpartition(":")[2]) if cell.address == "same" else free_port())
            clients.address = stage.address
        elif cell.target == "node" and cell.harm == "killed":
            await stage.replace_node(cell)
        if cell.target != "gateway" or cell.harm == "reset":  # what nobody needed is not missed: give it the time to be
            patience_s = 3.0 if cell.harm == "reset" else _PATIENCE_S
            await _until_or_not(lambda: _is_noticed(watch), patience_s)
        well = await _until_or_not(watch.look)
        recovered_s, right_by_then = time.monotonic() - since, tally.right
        await _until_or_not(lambda: _true(tally.right >= right_by_then + _UNDER_WAY))
    noticed_s, noticed_as = watch.noticed_s, watch.noticed_as
    if cell.target == "gateway" and tally.first_error_at is not None:
        noticed_s, noticed_as = tally.first_error_at - since, "an error to a client"
    missing, quarantined = await _blocks_missing(stage)
    after = await stage.service.ask("pids")
    new_ports = listening_ports(pid for name in after if name not in before for pid in after[name])
    return {
        "cell": cell.name,
        "right": tally.right,
        "wrong": len(tally.wrong),
        "wrong_answers": tally.wrong[:5],
        "failed": dict(tally.failed),
        "errors": tally.errors,
        "noticed_s": noticed_s,
        "noticed_as": noticed_as if noticed_s is not None else "",
        "slowest_s": tally.slowest_s,
        "longest_silence_s": tally.longest_silence_s,
        "recovered_s": recovered_s if well else None,
        "replaced": sorted(watch.replaced),
        "gone_s": gone_s,
        "still_frozen_at_thaw": still_frozen,
        "processes_or_connections": reached,
        "blocks_missing": missing,
        "blocks_quarantined": quarantined,
        "address": _address(stage, cell, old_address, old_ports & new_ports),
        "log": [line for line in stage.service.process.text()[log_before:].splitlines() if " gateway " in line][-40:],
    }


async def _freeze(stage: Stage, cell: Cell, watch: _Watch, pids: list[int], since: float) -> tuple[float | None, int]:
    """Until 40 s are over, or what is frozen was ended before; when that was, and how many went on at the end."""
    joined = False
    while (now := time.monotonic()) < since + FREEZE_S:
        if cell.target != "gateway":
            await watch.look()
        if cell.target == "node" and cell.address == "new" and watch.noticed_s is not None and not joined:
            joined = True
            await stage.replace_node(cell)
        if not any(runs(pid) for pid in pids):
            return now - since, 0
        await asyncio.sleep(_LOOK_INTERVAL_S)
    thawed = stage.thaw(pids)
    if cell.target == "node" and cell.address == "same":
        await stage.replace_node(cell)
    return None, thawed


async def _is_noticed(watch: _Watch) -> bool:
    await watch.look()
    return watch.noticed_s is not None


async def _blocks_missing(stage: Stage) -> tuple[int, int]:
    """Of all workers, a while after nobody asks anything any more: those not free, and of these those in quarantine."""
    loads: list[dict[str, int]] = []

    async def all_free() -> bool:
        loads[:] = [worker["load"] for worker in await stage.workers()]
        return all(load["free_blocks"] == load["total_blocks"] for load in loads)

    await _until_or_not(all_free, 30.0)
    missing = sum(load["total_blocks"] - load["free_blocks"] for load in loads)
    return missing, sum(load["quarantined_blocks"] for load in loads)


def _address(stage: Stage, cell: Cell, old: str, kept_ports: set[int]) -> str:
    """Where what came afterwards is reached, beside what was."""
    if cell.target == "gateway":
        return f"{old}, then {stage.address}"
    if cell.target == "node" and cell.harm != "reset" and stage.nodes is not None:
        return f"the node is at {stage.nodes.nodes[stage.hurt_node]}"
    if cell.harm == "reset":
        return "endpoints of their own, made anew"
    return f"{len(kept_ports)} of its ports again" if kept_ports else "other ports"


async def _true(value: bool) -> bool:
    return value


async def _until(condition: Callable[[], Awaitable[bool]], what: str, interval_s: float = _LOOK_INTERVAL_S) -> None:
    if not await _until_or_not(condition, interval_s=interval_s):
        raise TimeoutError(f"waited {_PATIENCE_S:g} s in vain until {what}")


async def _until_or_not(
    condition: Callable[[], Awaitable[bool]], patience_s: float = _PATIENCE_S, interval_s: float = _LOOK_INTERVAL_S
) -> bool:
    give_up_at = time.monotonic() + patience_s
    while not await condition():
        if time.monotonic() >= give_up_at:
            return False
        await asyncio.sleep(interval_s)
    return True
