"""A whole service in a process of its own, which answers what is asked about its inside; arguments: FOLDER KEY=VALUE …

It is put together as `baton up` does it. In FOLDER it makes a Unix socket `asked`, on which a line with a question is
answered by a line of JSON, and a file `address` once it serves. With the gate's folder in the environment its workers
are those that can be held up there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.faults.gate import FOLDER, GatedActor, KeptFollower
from cluster.config.load import keep_grpc_out_of_forks, load_config
from cluster.gateway.fairness import TokenCounters
from cluster.gateway.observers import EngineObserver
from cluster.gateway.suspects import Suspects
from cluster.launch import Service, launch
from cluster.logs.setup import log_to_stderr
from cluster.ray import worker as ray_worker
from cluster.ray.actors import FollowerActor, WorkerActor
from cluster.ray.worker import RayWorker
from cluster.routing.load_tracker import LoadTracker
from cluster.server.doors import Doors
from cluster.server.garbage_collector import settle

T = TypeVar("T")
_OURS = ("cluster.", "workers.", "kv_transfer.")
_PIDS_PATIENCE_S = 2.0


class States(EngineObserver):
    """Remembers when which worker got into which state."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, str, str]] = []

    def worker_state_changed(self, engine_id: str, role: str, state: str) -> None:
        """See `EngineObserver.worker_state_changed`."""
        self.changes.append((time.monotonic(), engine_id, state))


class Inside:
    """Answers questions about a service.

    Args:
        service: it.
        doors: through which clients come.
        states: of its workers.
    """

    def __init__(self, service: Service, doors: Doors, states: States) -> None:
        self._service, self._doors, self._states = service, doors, states
        self._followers: dict[str, list[int]] = {}
        # Found before the collector is told to leave alone what is there.
        self._load_tracker = _only(LoadTracker)
        self._counters, self._suspects = _only(TokenCounters), _only(Suspects)

    async def answer(self, question: str) -> Mapping[str, Any]:
        """What is asked: workers, pids or books."""
        answers: dict[str, Callable[[], Any]] = {"workers": self._workers, "books": self._books}
        return await self._pids() if question == "pids" else answers[question]()

    def _workers(self) -> dict[str, Any]:
        replicas = self._service.engine.pools.replicas
        workers = [
            {
                "id": replica.engine_id,
                "role": replica.handle.role,
                "state": replica.state,
                "load": asdict(replica.load),
                "unreachable": dict(replica.unreachable_peers),
            }
            for replica in replicas
        ]
        return {"now": time.monotonic(), "workers": workers, "changes": self._states.changes}

    async def _pids(self) -> dict[str, list[int]]:
        """Of each worker that has started, its ranks' processes, the lead's first."""
        pids = {}
        for replica in self._service.engine.pools.replicas:
            if replica.info is None:
                continue
            name, handle = replica.engine_id, replica.handle
            if name not in self._followers and isinstance(handle, RayWorker):
                self._followers[name] = await asyncio.wait_for(handle.rank_pids(), _PIDS_PATIENCE_S)
            pids[name] = [replica.info.pid, *self._followers.get(name, [])]
        return pids

    def _books(self) -> dict[str, Any]:
        """What the gateway keeps of requests, and how many objects of each of Baton's types there are in all."""
        gc.collect()
        engine, tracker = self._service.engine, self._load_tracker
        types = Counter(type(each) for each in gc.get_objects())
        kinds = Counter[str]()
        for kind, count in types.items():
            if str(vars(kind).get("__module__", "")).startswith(_OURS):
                kinds[f"{kind.__module__}.{kind.__qualname__}"] += count
        rows = [row for table in (tracker.prefill_workers, tracker.decode_workers) for row in table.workers]
        return {
            "calls": self._doors.num_calls,
            "queued": engine.num_queued,
            "attempts": engine.num_attempts,
            "booked_requests": sum(row.running for row in rows),
            "booked_blocks": sum(row.usable_blocks - row.free_blocks for row in rows),
            "booked_s": round(sum(row.queued_s for row in rows), 6),
            "tenant_accounts": self._counters.num_remembered,
            "suspects": len(self._suspects),
            "tasks": len(asyncio.all_tasks()),
            "objects": dict(kinds),
        }


def _only(kind: type[T]) -> T:
    """The one object of this type that there is in this process."""
    (found,) = [each for each in gc.get_objects() if type(each) is kind]
    return found


async def serve(folder: Path, settings: Mapping[str, str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = load_config(environ={}, overrides=settings)
    log_to_stderr(config.logging.level, config.logging.format, "gateway")
    doors, states, stopping = Doors(config.server), States(), asyncio.Event()
    await doors.open()
    try:
        async with launch(config, lambda line: print(line, flush=True)) as service:
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray puts its own handlers in place when it starts
                asyncio.get_running_loop().add_signal_handler(number, stopping.set)
            service.engine.observe(states)
            await doors.serve(service.generation, service.engine, service.model_info, service.readiness.health)
            readiness = asyncio.create_task(service.readiness.run())
            inside = Inside(service, doors, states)
            settle()
            asked = await asyncio.start_unix_server(_answering(inside), folder / "asked")
            (folder / "address.part").write_text(json.dumps({"grpc": doors.address, "http": doors.http_url}))
            (folder / "address.part").rename(folder / "address")
            await stopping.wait()
            asked.close()
            readiness.cancel()
            await doors.drain(1.0)
            await doors.stop(grace_s=0)
    finally:
        await doors.stop(grace_s=0)


def _answering(inside: Inside) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                try:
                    said = await inside.answer(line.decode().strip())
                except Exception as error:
                    said = {"error": f"{type(error).__name__}: {error}"}
                writer.write(json.dumps(said).encode() + b"\n")
                await writer.drain()
        writer.close()

    return answer


def main() -> None:
    """Run the process."""
    keep_grpc_out_of_forks()
    if FOLDER in os.environ:
        setattr(ray_worker, WorkerActor.__name__, GatedActor)
        setattr(ray_worker, FollowerActor.__name__, KeptFollower)
    settings = dict(setting.split("=", 1) for setting in sys.argv[2:])
    asyncio.run(serve(Path(sys.argv[1]), settings))


if __name__ == "__main__":
    main()
