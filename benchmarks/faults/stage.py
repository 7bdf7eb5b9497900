"""A service to be hurt: its workers, their processes, the node or gateway that they run under, and what comes next."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.cells import Cell
from benchmarks.faults.gate import FOLDER, PORTS, Gate
from benchmarks.faults.harms import reset_connections, runs, send
from benchmarks.faults.ports import free_ports
from benchmarks.faults.served import Served, served
from benchmarks.faults.wider_recall import make_wider_recall
from benchmarks.free_port import free_port
from benchmarks.ray_nodes import RayNodes, ray_nodes

HEAD, HURT = "127.0.0.17", "127.0.0.18"
ROOM = {"prefill": 1.0, "decode": 1.0}
_FIRST_PORT, _PORTS_APART = 23_000, 10
_SETTINGS: Mapping[str, object] = {
    "server.http.enabled": "false",
    "metrics.enabled": "false",
    "logging.requests": "false",
    "prefill.enable_prefix_caching": "false",
    "prefill.max_num_batched_tokens": 48,
    **{f"{pool}.{key}": value for pool in ("prefill", "decode") for key, value in (
        ("replicas", 2), ("num_blocks", 256), ("threads", 1), ("num_cpus", 0.5),
    )},
}  # fmt: skip


@dataclass
class Stage:
    """A service of 2 × 2 workers that clients can be sent to; to hurt a follower, of one of each with two ranks.

    Attributes:
        target: who is to be hurt in it.
        folder: for its files.
        gate: at which its handoffs can be held up.
        service: its gateway's process.
        address: where clients find it.
        nodes: of its cluster, where it has several; else None.
        hurt_node: the one that is to be hurt.
    """

    target: str
    folder: Path
    gate: Gate
    settings: dict[str, object]
    environ: dict[str, str]
    stack: ExitStack
    service: Served = field(init=False)
    address: str = ""
    nodes: RayNodes | None = None
    hurt_node: str = "node-0"

    async def start(self, port: int) -> None:
        """Start the gateway at a port, and with it whatever it starts."""
        folder = self.folder / f"gateway-{time.monotonic():.0f}"
        self.service = self.stack.enter_context(
            served(folder, {**self.settings, "server.port": port}, {**self.environ, FOLDER: str(self.folder / "gate")})
        )
        self.address = (await self.service.wait())["grpc"]

    async def free_ports(self) -> None:
        """Let a successor have its predecessor's ports at once, where it is to have them."""
        if PORTS in self.environ:
            spans = json.loads(self.environ[PORTS]).values()
            await asyncio.to_thread(free_ports, min(first for first, _ in spans), max(last for _, last in spans))

    async def workers(self) -> list[dict[str, Any]]:
        """All, as the gateway has them."""
        found: list[dict[str, Any]] = (await self.service.ask("workers"))["workers"]
        return found

    async def engines_on_hurt_node(self) -> list[str]:
        """Engine ids."""
        assert self.nodes is not None
        there = set(self.nodes.workers(self.hurt_node))
        return [name for name, pids in (await self.service.ask("pids")).items() if there.intersection(pids)]

    async def victims(self, reached: Mapping[str, str]) -> tuple[list[str], list[int]]:
        """Who is to be hurt, of the handoff that is at the gate: engine ids, and processes."""
        if self.target == "gateway":
            return [], [self.service.process.pid]
        if self.target == "node":
            assert self.nodes is not None
            return await self.engines_on_hurt_node(), self.nodes.processes(self.hurt_node)
        pids = await self.service.ask("pids")
        if self.target == "follower":
            return [reached["decode"]], [pids[reached["decode"]][1]]
        roles = ("prefill", "decode") if self.target == "both" else (self.target,)
        engines = [reached[role] for role in roles]
        return engines, [pids[engine][0] for engine in engines]

    def hurt(self, harm: str, pids: list[int], others: list[int]) -> int:
        """Do it; how many processes or connections it reached. Workers lose their connections to others of these."""
        if harm == "reset":
            peers = None if self.target in ("gateway", "node") else others
            return sum(reset_connections(pid, peers) for pid in pids)
        if self.target == "node" and self.nodes is not None:
            if harm == "killed":
                self.nodes.kill(self.hurt_node)
                return len(pids)
            return len(self.nodes.freeze(self.hurt_node))
        return len(send(signal.SIGKILL if harm == "killed" else signal.SIGSTOP, pids))

    def thaw(self, pids: list[int]) -> int:
        """Let those go on that are frozen; how many there still are."""
        return len(send(signal.SIGCONT, [pid for pid in reversed(pids) if runs(pid)]))

    async def replace_node(self, cell: Cell) -> None:
        """Have a node join in place of the one that was hurt, at its address or at another one."""
        assert self.nodes is not None
        old, name = self.hurt_node, f"node-{len(self.nodes.nodes)}"
        address = self.nodes.nodes[old]
        if cell.address == "new":
            address = f"127.0.0.{18 + len(self.nodes.nodes)}"
        else:  # what is left of it ends, as whoever starts it again would see to
            await asyncio.to_thread(self.nodes.kill, old)
        await asyncio.to_thread(self.nodes.add, name, address, ROOM)
        self.hurt_node = name


@asynccontextmanager
async def stage(
    target: str, address: str, folder: Path, more: Mapping[str, object] | None = None
) -> AsyncIterator[Stage]:
    """Start a service that a target can be hurt in, whose successor gets the same or a new address; stop all of it.

    Args:
        target: of a cell.
        address: of a cell.
        folder: for its files.
        more: settings of its configuration.
    """
    await asyncio.to_thread((folder / "gate").mkdir, parents=True, exist_ok=True)
    settings = {**_SETTINGS, "logging.folder": str(folder / "logs"), **(more or {})}
    environ = {"OMP_NUM_THREADS": "1"}
    if address == "same" and target in ("prefill", "decode", "both", "follower"):
        environ[PORTS] = json.dumps(_ports(target))
    if target == "follower":
        settings["model.path"] = str(make_wider_recall(folder / "recall"))
        for pool in ("prefill", "decode"):
            settings |= {f"{pool}.replicas": 1, f"{pool}.tensor_parallel_size": 2}
    with ExitStack() as stack:
        made = Stage(target, folder, Gate(folder / "gate"), settings, environ, stack)
        if target == "node":
            stack.enter_context(_environment({FOLDER: str(folder / "gate"), "OMP_NUM_THREADS": "1"}))
            made.nodes = stack.enter_context(ray_nodes(HEAD, ROOM))
            await asyncio.to_thread(made.nodes.add, made.hurt_node, HURT, ROOM)
            made.environ |= {**made.nodes.environment, "UCX_NET_DEVICES": "lo"}
            settings["ray.address"] = made.nodes.address
            settings |= {f"{pool}.resources": f"{pool}=1" for pool in ("prefill", "decode")}
        await made.start(free_port())
        yield made


def _ports(target: str) -> dict[str, tuple[int, int]]:
    """Of each place in the pools, see `keep_ports`."""
    names, endpoints = [f"{role}-{number}" for role in ("prefill", "decode") for number in range(2)], 3
    if target == "follower":
        names, endpoints = ["prefill-0", "prefill-0-rank1", "decode-0", "decode-0-rank1"], 2
    firsts = [_FIRST_PORT + _PORTS_APART * number for number in range(len(names))]
    return {name: (first, first + 2 * endpoints - 2) for name, first in zip(names, firsts, strict=True)}


@contextlib.contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
