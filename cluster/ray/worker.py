"""The gateway's handle on a worker that is a Ray actor, or one a rank."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.errors import WorkerLostError
from cluster.ray.actor_process import have_processes
from cluster.ray.actors import FollowerActor, WorkerActor
from cluster.ray.lease_keeper import LeaseKeeper
from cluster.ray.placement_group import RankPlacement, RankResources
from cluster.ray.process_end import Whereabouts, all_ended
from cluster.ray.waiting import awaited, tell_if_it_takes_long
from cluster.worker_handle import HEARTBEAT_S, LoadProgress, StartProgress
from kv_transfer.link_cost import LinkCost, together
from kv_transfer.transports.base import EngineInfo
from workers.config import WorkerConfig
from workers.heartbeat import Heartbeat
from workers.messages import StepOutput, WorkerRequest
from workers.worker_host import WorkerInfo

_PROGRESS_INTERVAL_S = 0.25
LOOK_INTERVAL_S = 1.0
STOP_TIMEOUT_S = 5.0
_SILENT_AFTER_S = 2.5 * HEARTBEAT_S


class RayWorker:
    """A `WorkerHandle` over Ray actors, created at once and started by `start`.

    Requests go to the lead, which passes them on; peers are met by every rank. The ranks live and die together: when
    one is lost the lead's output ends, and `stop` ends them all.

    Args:
        config: the worker's.
        resources: what each rank gets.
        leases: renews each rank's.
    """

    def __init__(self, config: WorkerConfig, resources: RankResources, leases: LeaseKeeper) -> None:
        self.name = config.name
        self.role = config.role
        self._lost = False
        self._ranks_at: Sequence[Whereabouts] = ()
        self._heard_at = 0.0
        self._leases = leases
        self._resources = resources
        self._placement = RankPlacement(config.name, config.tensor_parallel_size, resources)
        self._lead: Any = self._placement.create(WorkerActor, 0, config)
        self._followers: list[Any] = [
            self._placement.create(FollowerActor, rank, config) for rank in range(1, config.tensor_parallel_size)
        ]

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """See `WorkerHandle.start`."""
        ranks = (self._lead, *self._followers)
        waiting = asyncio.create_task(
            tell_if_it_takes_long(self.name, lambda: awaited(self._resources, len(ranks), ray.available_resources()))
        )
        try:
            await self._placement.wait()
            await self._first_answer(progress)
        finally:
            waiting.cancel()
        self._ranks_at = await asyncio.gather(*(self._call(rank.whereabouts.remote()) for rank in ranks))
        seats = (await self._call(self._lead.seats.remote()))[1:] if self._followers else ()
        starts = [asyncio.ensure_future(self._call(self._lead.start.remote()))]
        for follower, seat in zip(self._followers, seats, strict=True):
            starts.append(asyncio.ensure_future(self._call(follower.start.remote(seat))))
        try:
            while not await _all_done(starts, _PROGRESS_INTERVAL_S):
                with contextlib.suppress(WorkerLostError):
                    await self._tell_progress(progress)
        finally:
            for start in starts:
                start.cancel()  # one has failed: the others wait for it in vain, and `stop` ends them
        with contextlib.suppress(WorkerLostError):
            await self._tell_progress(progress)
        info: WorkerInfo = starts[0].result()
        return info

    async def _first_answer(self, progress: LoadProgress) -> None:
        """Until all ranks answer; tells when they have processes, from which on they should."""
        ranks = (self._lead, *self._followers)
        answer = asyncio.ensure_future(self._tell_progress(progress))
        try:
            while not await _all_done([answer], LOOK_INTERVAL_S):
                with contextlib.suppress(Exception):  # Ray may be out of reach for a while
                    if await asyncio.to_thread(have_processes, ranks):
                        progress(self.name, StartProgress("process", 0, len(ranks)))
                        break
            await answer
        finally:
            answer.cancel()

    async def _tell_progress(self, progress: LoadProgress) -> None:
        """How far the start is, once all ranks have answered: it is told nothing if one of them is frozen."""
        ranks = (self._lead, *self._followers)
        stages, *_ = await asyncio.gather(*(self._call(rank.progress.remote()) for rank in ranks))
        for stage in (StartProgress("process", len(ranks), len(ranks)), *stages):
            progress(self.name, stage)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        """See `WorkerHandle.new_endpoint`."""
        ranks = (self._lead, *self._followers)
        return tuple(await asyncio.gather(*(self._call(rank.new_endpoint.remote(peer)) for rank in ranks)))

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `WorkerHandle.connect`."""
        await asyncio.gather(*(self._call(rank.connect.remote(peer)) for rank in (self._lead, *self._followers)))

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHandle.probe`; of the slowest rank."""
        probes = (self._call(rank.probe.remote(engine_id)) for rank in (self._lead, *self._followers))
        return float(max(await asyncio.gather(*probes)))

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """See `WorkerHandle.link_to`."""
        ranks = (self._lead, *self._followers)
        paths = await asyncio.gather(*(self._call(rank.link_to.remote(engine_id)) for rank in ranks))
        return together([path for path in paths if path is not None])

    def submit(self, request: WorkerRequest) -> None:
        """See `WorkerHandle.submit`."""
        self._lead.submit.remote(request)

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """See `WorkerHandle.abort`."""
        self._lead.abort.remote(attempt_id, index)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """See `WorkerHandle.disconnect`."""
        self._lead.disconnect.remote(engine_id, confirmed_dead)

    async def rank_pids(self) -> list[int]:
        """The followers' processes, in order of rank; the lead's is in its `WorkerInfo`."""
        return [int(await self._call(follower.pid.remote())) for follower in self._followers]

    async def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        """See `WorkerHandle.outputs`."""
        stream = self._lead.outputs.options(num_returns="streaming").remote()
        for name, rank in self._ranks.items():
            self._leases.keep(name, partial(_renew, rank))
        try:
            async for ref in stream:
                batch = await ref
                self._heard_at = time.monotonic()
                yield batch
        except RayError as error:
            self._lost = True
            raise WorkerLostError(f"{self.name} is gone: {_first_line(error)}") from error
        raise WorkerLostError(f"{self.name} ended its output")

    async def stop(self) -> bool:
        """See `WorkerHandle.stop`."""
        ranks = self._ranks.values()
        for name in self._ranks:  # first of all: what may write to others' memory is not to go on
            self._leases.release(name)
        if not self._lost and self._heard_at and time.monotonic() - self._heard_at > _SILENT_AFTER_S:
            self._lost = True
        stopped = False
        if not self._lost:  # one that is lost ends as it is: its ranks may be waiting for each other
            stops = asyncio.gather(*(rank.stop.remote() for rank in ranks))
            with contextlib.suppress(Exception):
                await asyncio.wait_for(stops, STOP_TIMEOUT_S)
                stopped = True
        for rank in ranks:
            with contextlib.suppress(Exception):
                ray.kill(rank)
        self._placement.remove()
        return stopped or await self.has_ended()

    async def has_ended(self) -> bool:
        """See `WorkerHandle.has_ended`; nobody has met one that never said where it is."""
        return await all_ended(self._ranks_at)

    @property
    def _ranks(self) -> dict[str, Any]:
        """Each rank's actor, by a name that no other rank of the service has."""
        return {f"{self.name} {id(self)} {rank}": actor for rank, actor in enumerate((self._lead, *self._followers))}

    async def _call(self, ref: Any) -> Any:
        """Await a call; what the worker raised is raised here, a dead worker is a `WorkerLostError`."""
        try:
            return await ref
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise WorkerLostError(f"{self.name} is gone: {_first_line(error)}") from error


async def _all_done(tasks: Sequence[asyncio.Future[Any]], timeout_s: float) -> bool:
    """Whether all have ended well, after so long at most; raises what the first one that failed has raised."""
    done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        if task in done:
            task.result()
    return not pending


def _renew(rank: Any, said_at: float | None) -> Future[float]:
    future: Future[float] = rank.renew.remote(said_at).future()
    return future


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, RayTaskError) else lines[0]) if lines else type(error).__name__
