"""A worker in the gateway's own process, joined to its peers by a `LocalFabric`: for tests, and for trying things."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from cluster.errors import WorkerLostError
from cluster.worker_handle import HEARTBEAT_S, LoadProgress, StartProgress
from kv_transfer.link_cost import LinkCost
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.base import EngineInfo
from kv_transfer.transports.local import LocalFabric
from workers.config import WorkerConfig
from workers.heartbeat import Heartbeat
from workers.messages import StepOutput, WorkerRequest
from workers.worker_host import WorkerHost, WorkerInfo

_TIMEOUT_S = 10.0
_PROGRESS_INTERVAL_S = 0.25


class InProcessWorker:
    """A `WorkerHandle` whose worker is a thread here.

    Args:
        config: the worker's.
        fabric: shared with its peers.
    """

    def __init__(self, config: WorkerConfig, fabric: LocalFabric) -> None:
        self.name = config.name
        self.role = config.role
        self._config = config
        self._fabric = fabric
        self._queue: asyncio.Queue[StepOutput | BaseException] = asyncio.Queue()
        self._building: asyncio.Future[WorkerHost] | None = None

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """See `WorkerHandle.start`."""
        loop = asyncio.get_running_loop()

        def deliver(item: StepOutput | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        def build() -> WorkerHost:
            return WorkerHost(
                self._config,
                LocalConnector(self._fabric, threaded=True),
                deliver,
                deliver,
                lambda done, total: progress(self.name, StartProgress("weights", done, total)),
                lambda done, total: progress(self.name, StartProgress("graphs", done, total)),
            )

        self._building = asyncio.ensure_future(asyncio.to_thread(build))
        while not self._building.done():
            progress(self.name, StartProgress("process", 1, 1))
            # A thread cannot be cancelled: `stop` ends what it built.
            await asyncio.wait({self._building}, timeout=_PROGRESS_INTERVAL_S)
        self._host = self._building.result()
        return self._host.info

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        """See `WorkerHandle.new_endpoint`."""
        return (await asyncio.to_thread(self._host.new_endpoint, peer, _TIMEOUT_S),)

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `WorkerHandle.connect`."""
        await asyncio.to_thread(self._host.connect, peer, _TIMEOUT_S)

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHandle.probe`."""
        return await asyncio.to_thread(self._host.probe, engine_id, _TIMEOUT_S)

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """See `WorkerHandle.link_to`."""
        return self._host.link_to(engine_id)

    def submit(self, request: WorkerRequest) -> None:
        """See `WorkerHandle.submit`."""
        self._host.submit(request)

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """See `WorkerHandle.abort`."""
        self._host.abort(attempt_id, index)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """See `WorkerHandle.disconnect`."""
        self._host.disconnect(engine_id, confirmed_dead)

    async def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        """See `WorkerHandle.outputs`."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    item = await self._queue.get()
            except TimeoutError:
                yield [self._host.heartbeat()]
                continue
            if isinstance(item, BaseException):
                raise WorkerLostError(f"{self.name} is gone: {item}") from item
            yield [item]

    async def stop(self) -> bool:
        """See `WorkerHandle.stop`."""
        if self._building is not None:
            with contextlib.suppress(Exception):
                host = await self._building
                await asyncio.to_thread(host.close)
        return True

    async def has_ended(self) -> bool:
        """See `WorkerHandle.has_ended`."""
        return True

    def crash(self, reason: str) -> None:
        """End the worker as if its process had died."""
        self._host.close()
        self._queue.put_nowait(WorkerLostError(reason))
