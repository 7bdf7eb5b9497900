"""A worker as Ray actors: a process a rank, of which the lead has the one token stream."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from cluster.logs.setup import log_to_file
from cluster.ray.process_end import Whereabouts
from cluster.worker_handle import HEARTBEAT_S, StartProgress
from kv_transfer.lease import Lease, lease_clock
from kv_transfer.link_cost import LinkCost
from kv_transfer.nixl_connector import NixlConnector
from kv_transfer.transports.base import EngineInfo
from workers.config import WorkerConfig
from workers.heartbeat import Heartbeat
from workers.lockstep.channel import LeadChannel, Seat
from workers.lockstep.follower_host import FollowerHost
from workers.messages import StepOutput, WorkerRequest
from workers.worker_host import WorkerHost, WorkerInfo

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
_REMEMBERED_ABORTS = 4096


class WorkerActor:
    """Runs a `WorkerHost`: a worker, or the lead of a worker with several ranks.

    Its methods are asynchronous, so that a slow one holds up no other. Ray then starts calls in order except that one
    with a large argument (a long prompt) may be overtaken while the argument travels.

    Args:
        config: the worker's.
        make_host: called as `WorkerHost` is.
        lease: how long the worker may write that nobody hears; None: as `Lease` has it.
    """

    def __init__(
        self, config: WorkerConfig, make_host: Callable[..., WorkerHost] = WorkerHost, lease: Lease | None = None
    ) -> None:
        self._config = config
        _log(config)
        self._make_host = make_host
        self._loop = asyncio.get_event_loop()
        self._host: WorkerHost | None = None
        self._outputs: list[StepOutput | Heartbeat] = []
        self._news = asyncio.Event()
        self._crash: BaseException | None = None
        self._progress: dict[str, StartProgress] = {}
        self._channel: LeadChannel | None = None
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._lease = lease or Lease()

    async def start(self) -> WorkerInfo:
        """Build the worker; takes as long as loading does."""
        self._host = await asyncio.to_thread(self._build)
        return self._host.info

    def _build(self) -> WorkerHost:
        return self._make_host(
            self._config,
            NixlConnector(lease=self._lease),
            self._emit,
            self._on_crash,
            lambda done, total: self._on_progress(StartProgress("weights", done, total)),
            lambda done, total: self._on_progress(StartProgress("graphs", done, total)),
            self._channel,
        )

    async def seats(self) -> tuple[Seat, ...]:
        """The places of all ranks, this one's first; to be asked for before the start if there are others."""
        if self._channel is None:
            self._channel = LeadChannel(self._config.tensor_parallel_size)
        return self._channel.seats

    async def progress(self) -> list[StartProgress]:
        """How far each stage of the start is that has begun."""
        return list(self._progress.values())

    async def submit(self, request: WorkerRequest) -> None:
        """See `WorkerHost.submit`. A request whose abort has overtaken it is not started."""
        if request.attempt_id not in self._aborted:
            self._started.submit(request)

    async def abort(self, attempt_id: str, index: int | None = None) -> None:
        """See `WorkerHost.abort`."""
        if index is None:
            self._aborted[attempt_id] = None
        if len(self._aborted) > _REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)
        self._started.abort(attempt_id, index)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> EngineInfo:
        """See `WorkerHost.new_endpoint`."""
        return await asyncio.to_thread(self._started.new_endpoint, peer, CONNECT_TIMEOUT_S)

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `WorkerHost.connect`."""
        await asyncio.to_thread(self._started.connect, peer, CONNECT_TIMEOUT_S)

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHost.probe`."""
        return await asyncio.to_thread(self._started.probe, engine_id, CONNECT_TIMEOUT_S)

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """See `WorkerHost.link_to`."""
        return self._started.link_to(engine_id)

    async def disconnect(self, engine_id: str, confirmed_dead: bool) -> None:
        """See `WorkerHost.disconnect`."""
        self._started.disconnect(engine_id, confirmed_dead)

    async def renew(self, said_at: float | None) -> float:
        """What it said at `said_at` was heard: for a lease's length from then it may write. Returns its clock."""
        return _renewed(self._lease, said_at)

    async def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        """Everything the worker says, in lists of what has gathered since the last one.

        Heartbeats come from this event loop, and not from the thread that steps, which may be compiling or computing
        something long, or hang.
        """
        self._loop.call_later(HEARTBEAT_S, self._beat)
        self._lease.renew(lease_clock())
        while True:
            await self._news.wait()
            self._news.clear()
            batch, self._outputs = self._outputs, []
            if batch or self._crash is None:
                yield batch
            if self._crash is not None:
                raise self._crash

    async def whereabouts(self) -> Whereabouts:
        """Where the lead runs."""
        return Whereabouts.own()

    async def stop(self) -> None:
        """End the worker in good order."""
        if self._host is not None:
            await asyncio.to_thread(self._host.close)
        elif self._channel is not None:
            self._channel.close()

    @property
    def _started(self) -> WorkerHost:
        if self._host is None:
            raise RuntimeError(f"{self._config.name} has not started")
        return self._host

    def _beat(self) -> None:
        if self._host is not None:
            self._outputs.append(self._host.heartbeat())
        self._news.set()
        self._loop.call_later(HEARTBEAT_S, self._beat)

    def _emit(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._gather, output)

    def _gather(self, output: StepOutput) -> None:
        self._outputs.append(output)
        self._news.set()

    def _on_crash(self, error: BaseException) -> None:
        self._crash = RuntimeError(f"{self._config.name} crashed: {type(error).__name__}: {error}")
        self._loop.call_soon_threadsafe(self._news.set)

    def _on_progress(self, progress: StartProgress) -> None:
        self._progress[progress.stage] = progress


class FollowerActor:
    """Runs a `FollowerHost`: a rank that does what the worker's lead says. Without its lead its process ends.

    Args:
        config: the worker's.
        make_host: called as `FollowerHost` is.
    """

    def __init__(self, config: WorkerConfig, make_host: Callable[..., FollowerHost] = FollowerHost) -> None:
        self._config = config
        self._make_host = make_host
        self._host: FollowerHost | None = None
        self._lease = Lease()

    async def start(self, seat: Seat) -> None:
        """Build the rank; returns when the lead knows of it."""
        _log(self._config, f"-rank{seat.rank}")
        connector = NixlConnector(lease=self._lease)
        self._host = await asyncio.to_thread(self._make_host, self._config, seat, connector, self._on_end)

    async def renew(self, said_at: float | None) -> float:
        """See `WorkerActor.renew`."""
        return _renewed(self._lease, said_at)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> EngineInfo:
        """See `FollowerHost.new_endpoint`."""
        return await asyncio.to_thread(self._started.new_endpoint, peer, CONNECT_TIMEOUT_S)

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `FollowerHost.connect`."""
        await asyncio.to_thread(self._started.connect, peer, CONNECT_TIMEOUT_S)

    async def probe(self, engine_id: str) -> float:
        """See `FollowerHost.probe`."""
        return await asyncio.to_thread(self._started.probe, engine_id, CONNECT_TIMEOUT_S)

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """See `FollowerHost.link_to`."""
        return self._started.link_to(engine_id)

    async def progress(self) -> list[StartProgress]:
        """That this process answers; the lead says how far they are."""
        return []

    async def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    async def whereabouts(self) -> Whereabouts:
        """Where this rank runs."""
        return Whereabouts.own()

    async def stop(self) -> None:
        """End the rank in good order; the lead must be told, too."""
        if self._host is not None:
            await asyncio.to_thread(self._host.close)

    @property
    def _started(self) -> FollowerHost:
        if self._host is None:
            raise RuntimeError(f"a rank of {self._config.name} has not started")
        return self._host

    def _on_end(self, error: BaseException | None) -> None:
        """End the process, if not in good order: the thread that steps may wait in a collective, and never return."""
        if error is not None:
            logger.error("a rank of %s ends: %s", self._config.name, error)
            os._exit(1)


def _renewed(lease: Lease, said_at: float | None) -> float:
    if said_at is not None:
        lease.renew(said_at)
    return lease_clock()


def _log(config: WorkerConfig, rank: str = "") -> None:
    """Have this process log to a file that is called as its worker is."""
    if config.log_folder is not None:
        log_to_file(config.log_level, config.log_format, config.name + rank, Path(config.log_folder))
