"""The two pools of workers: starts them, introduces them to each other, watches them, replaces those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from cluster.api import WorkerStatus
from cluster.errors import WorkerLostError
from cluster.worker_handle import LoadProgress, WorkerHandle
from kv_transfer.errors import KVTransferError, LayoutMismatchError
from workers.errors import ConfigError
from workers.host import WorkerInfo
from workers.messages import Load, StepOutput

logger = logging.getLogger(__name__)

_RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
_HOPELESS_AFTER_RESTARTS = 6
_STEADY_AFTER_S = 60.0
_RECONCILE_INTERVAL_S = 2.0


@dataclass(eq=False)
class Member:
    """One place in a pool, and whoever holds it.

    Attributes:
        spawn: makes a new worker for this place.
        handle: the worker.
        info: what it said of itself; None until it is ready.
        state: starting, ready or lost.
        load: last reported.
        refusals: engine ids of the other pool whose KV cache is laid out differently, and how.
        estranged: engine ids of the other pool that it cannot reach at present, and why.
        restarts: workers that this place has lost in a row.
        ready_since: monotonic time.
    """

    spawn: Callable[[], WorkerHandle]
    handle: WorkerHandle
    info: WorkerInfo | None = None
    state: str = "starting"
    load: Load = field(default_factory=lambda: Load(0, 0))
    refusals: dict[str, str] = field(default_factory=dict)
    estranged: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    ready_since: float = 0.0

    @property
    def has_a_future(self) -> bool:
        """Whether it is ready, or likely to be soon."""
        return self.state == "ready" or self.restarts < _HOPELESS_AFTER_RESTARTS

    @property
    def engine_id(self) -> str:
        """Of the worker that holds this place; its name until it is ready."""
        return self.info.engine.engine_id if self.info is not None else self.handle.name


class WorkerPools:
    """Every worker of the service.

    Args:
        prefill: makes each prefill worker.
        decode: makes each decode worker.
        on_output: takes every step's output.
        on_change: called when a worker became ready or was lost; for a lost one with its engine id.
        progress: told how far loading is.
    """

    def __init__(
        self,
        prefill: Sequence[Callable[[], WorkerHandle]],
        decode: Sequence[Callable[[], WorkerHandle]],
        *,
        on_output: Callable[[StepOutput], None],
        on_change: Callable[[str | None], None],
        progress: LoadProgress = lambda name, progress: None,
    ) -> None:
        self._on_output = on_output
        self._on_change = on_change
        self._progress = progress
        self._tasks: set[asyncio.Task[None]] = set()
        self._introductions = asyncio.Lock()
        self.members = [Member(spawn, spawn()) for spawn in (*prefill, *decode)]

    def pool(self, role: str) -> list[Member]:
        """The members of one pool."""
        return [member for member in self.members if member.handle.role == role]

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return [member.info for member in self.members if member.info is not None]

    def find(self, engine_id: str) -> Member | None:
        """The member that holds this engine now."""
        return next((member for member in self.members if member.engine_id == engine_id), None)

    def status(self) -> list[WorkerStatus]:
        """Every worker, prefill first."""
        return [_status(member) for member in self.members]

    async def start(self) -> None:
        """Start all workers and introduce them.

        Raises:
            BatonError: a worker could not start, or no pair of workers can work together.
        """
        starts = [asyncio.ensure_future(self._start_member(member)) for member in self.members]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        self._check_some_pair_works()

    async def stop(self) -> None:
        """Stop all workers."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.handle.stop() for member in self.members), return_exceptions=True)

    async def _start_member(self, member: Member) -> None:
        member.info = await member.handle.start(self._progress)
        member.load = Load(member.info.num_blocks, member.info.num_blocks)
        async with self._introductions:
            await self._introduce(member)
            member.state = "ready"
            member.ready_since = time.monotonic()
        self._spawn_task(self._watch(member))
        self._on_change(None)

    async def _introduce(self, member: Member) -> None:
        """Make a new worker and every ready one of the other pool known to each other."""
        member.refusals, member.estranged = {}, {}
        for peer in self.members:
            if peer.state != "ready" or peer.handle.role == member.handle.role:
                continue
            try:
                await self._meet(member, peer)
            except LayoutMismatchError as error:
                member.refusals[peer.engine_id] = str(error)
                logger.warning("%s", error)
            except (KVTransferError, WorkerLostError) as error:
                member.estranged[peer.engine_id] = str(error)
                logger.warning("%s and %s cannot meet: %s", member.engine_id, peer.engine_id, error)
                self._spawn_task(self._reconcile(member, peer))

    async def _reconcile(self, one: Member, other: Member) -> None:
        """Introduce two workers again and again until they reach each other or one of them is gone."""
        names = (one.engine_id, other.engine_id)
        while True:
            await asyncio.sleep(_RECONCILE_INTERVAL_S)
            if (one.engine_id, other.engine_id) != names or "lost" in (one.state, other.state):
                return
            with contextlib.suppress(KVTransferError, WorkerLostError):
                await self._meet(one, other)
                one.estranged.pop(names[1], None)
                self._on_change(None)
                return

    async def _meet(self, one: Member, other: Member) -> None:
        assert one.info is not None
        assert other.info is not None
        await one.handle.connect(other.info.engines)
        await other.handle.connect(one.info.engines)
        seconds = await one.handle.probe(other.engine_id)
        logger.info("%s and %s: round trip %.1f ms", one.engine_id, other.engine_id, seconds * 1e3)

    def _check_some_pair_works(self) -> None:
        refusals = [why for member in self.members for why in (member.refusals | member.estranged).values()]
        pairs = len(self.pool("prefill")) * len(self.pool("decode"))
        if refusals and len(refusals) == pairs:
            raise ConfigError("no prefill worker can hand over to any decode worker: " + refusals[0])

    async def _watch(self, member: Member) -> None:
        """Pass on what a worker says until it is lost, then replace it."""
        try:
            async for batch in member.handle.outputs():
                for output in batch:
                    member.load = output.load
                    self._on_output(output)
        except WorkerLostError as error:
            logger.warning("%s", error)
        except Exception:
            logger.exception("lost touch with %s", member.engine_id)
        await self._lose(member)

    async def _lose(self, member: Member) -> None:
        lost = member.engine_id
        member.state = "lost"
        if time.monotonic() - member.ready_since > _STEADY_AFTER_S:
            member.restarts = 0
        await member.handle.stop()  # before its peers are told: then nothing of it writes any more
        for peer in self.members:
            peer.refusals.pop(lost, None)
            peer.estranged.pop(lost, None)
            if peer.state == "ready" and peer.handle.role != member.handle.role:
                peer.handle.disconnect(lost)
        self._on_change(lost)
        self._spawn_task(self._replace(member))

    async def _replace(self, member: Member) -> None:
        while True:
            delay = _RESTART_DELAYS_S[min(member.restarts, len(_RESTART_DELAYS_S) - 1)]
            member.restarts += 1
            await asyncio.sleep(delay)
            member.handle = member.spawn()
            member.info = None
            member.state = "starting"
            try:
                await self._start_member(member)
            except Exception as error:
                logger.warning("could not replace %s: %s: %s", member.handle.name, type(error).__name__, error)
                member.state = "lost"
                member.info = None
                with contextlib.suppress(Exception):
                    await member.handle.stop()
            else:
                return

    def _spawn_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _status(member: Member) -> WorkerStatus:
    info = member.info
    return WorkerStatus(
        engine_id=member.engine_id,
        role=member.handle.role,
        state=member.state,
        device=info.device if info else "",
        attention_backend=info.attention_backend if info else "",
        block_size=info.engine.layout.block_size if info else 0,
        load=member.load,
    )
