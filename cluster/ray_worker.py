"""The gateway's handle on a worker that is a Ray actor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.actors import WorkerActor
from cluster.errors import WorkerLostError
from cluster.worker_handle import LoadProgress
from kv_transfer.transport import EngineInfo
from workers.config import WorkerConfig
from workers.host import WorkerInfo
from workers.messages import DecodeRequest, PrefillRequest, StepOutput

_PROGRESS_INTERVAL_S = 0.25
_STOP_TIMEOUT_S = 5.0


class RayWorker:
    """A `WorkerHandle` over a Ray actor, created at once and started by `start`.

    Args:
        config: the worker's.
        num_cpus: CPUs that Ray reserves for it.
        num_gpus: GPUs that Ray reserves for it.
        env: environment of its process.
    """

    def __init__(self, config: WorkerConfig, *, num_cpus: float, num_gpus: float, env: Mapping[str, str]) -> None:
        self.name = config.name
        self.role = config.role
        self._actor: Any = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=0,
                max_concurrency=1000,
                runtime_env={"env_vars": dict(env)},
            )
            .remote(config)
        )

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """See `WorkerHandle.start`."""
        started = asyncio.ensure_future(self._call(self._actor.start.remote()))
        while not started.done():
            await asyncio.wait([started], timeout=_PROGRESS_INTERVAL_S)
            if not started.done():
                with contextlib.suppress(WorkerLostError):
                    progress(self.name, *await self._call(self._actor.loaded.remote()))
        info: WorkerInfo = started.result()
        return info

    async def connect(self, peer: EngineInfo) -> None:
        """See `WorkerHandle.connect`."""
        await self._call(self._actor.connect.remote(peer))

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHandle.probe`."""
        return float(await self._call(self._actor.probe.remote(engine_id)))

    def submit(self, request: PrefillRequest | DecodeRequest) -> None:
        """See `WorkerHandle.submit`."""
        self._actor.submit.remote(request)

    def abort(self, request_id: str) -> None:
        """See `WorkerHandle.abort`."""
        self._actor.abort.remote(request_id)

    def disconnect(self, engine_id: str) -> None:
        """See `WorkerHandle.disconnect`."""
        self._actor.disconnect.remote(engine_id)

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        """See `WorkerHandle.outputs`."""
        stream = self._actor.outputs.options(num_returns="streaming").remote()
        try:
            async for ref in stream:
                yield await ref
        except RayError as error:
            raise WorkerLostError(f"{self.name} is gone: {_first_line(error)}") from error
        raise WorkerLostError(f"{self.name} ended its output")

    async def stop(self) -> None:
        """See `WorkerHandle.stop`."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._actor.stop.remote(), _STOP_TIMEOUT_S)
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    async def _call(self, ref: Any) -> Any:
        """Await a call; what the worker raised is raised here, a dead worker is a `WorkerLostError`."""
        try:
            return await ref
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise WorkerLostError(f"{self.name} is gone: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, RayTaskError) else lines[0]) if lines else type(error).__name__
