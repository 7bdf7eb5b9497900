"""The two pools as the engine sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from cluster.api import PoolTarget, WorkerStatus
from cluster.pools.burials import Burials
from cluster.pools.gpu_budget import GpuBudget
from cluster.pools.groups import Places, PoolLimits, groups_of_pools
from cluster.pools.handshake import Handshakes
from cluster.pools.patience import Patience
from cluster.pools.pinned_identity import PinnedIdentity
from cluster.pools.replica import Loss, OnState, Replica, Roster
from cluster.pools.scaling import Obligations, Scaling
from cluster.pools.streams import OutputStreams
from cluster.pools.supervisor import Supervisor
from cluster.pools.tasks import BackgroundTasks
from cluster.worker_handle import LoadProgress
from workers.messages import StepOutput
from workers.worker_host import WorkerInfo


class WorkerPools:
    """Every worker of the service.

    Args:
        prefill: makes a prefill worker for each place in the pool.
        decode: makes a decode worker for each place in the pool.
        on_output: takes every step's output.
        on_change: called when somebody came, drains, left or was lost; for a lost one with its loss.
        on_state: told of a member whose state has changed.
        limits: of the groups' sizes, by key; one that is not named has all its places held.
        obligations: what the requests under way need of the workers.
        progress: told how far loading is.
        patience: with workers that are silent or do not get on.
        tokenizer: see `PinnedIdentity`.
        gpus: what bounds the groups besides; None: nothing.
    """

    def __init__(
        self,
        prefill: Places,
        decode: Places,
        *,
        on_output: Callable[[StepOutput], None],
        on_change: Callable[[Loss | None], None],
        on_state: OnState = lambda engine_id, role, state: None,
        limits: Mapping[str, PoolLimits] | None = None,
        obligations: Obligations | None = None,
        progress: LoadProgress = lambda name, progress: None,
        patience: Patience | None = None,
        tokenizer: str | None = None,
        gpus: GpuBudget | None = None,
    ) -> None:
        self._roster = Roster(on_state)
        self._tasks = BackgroundTasks()
        self._handshakes = Handshakes(self._roster, self._tasks, lambda: on_change(None))
        self._pinned_identity = PinnedIdentity(tokenizer)
        burials = Burials(self._roster, self._handshakes, self._tasks)
        self._supervisor = Supervisor(
            self._roster,
            self._handshakes,
            burials,
            self._tasks,
            OutputStreams(on_output),
            on_change,
            progress,
            patience or Patience(),
            self._pinned_identity,
        )
        self._scaling = Scaling(
            groups_of_pools({"prefill": prefill, "decode": decode}, limits or {}),
            self._roster,
            self._supervisor,
            burials,
            self._tasks,
            obligations or Obligations(),
            lambda: on_change(None),
            gpus,
        )

    @property
    def replicas(self) -> list[Replica]:
        """Everybody, prefill first."""
        return list(self._roster)

    @property
    def identity_digest(self) -> bytes:
        """See `PinnedIdentity.digest`."""
        return self._pinned_identity.digest

    def pool(self, role: str) -> list[Replica]:
        """The members of one pool."""
        return self._roster.pool(role)

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return [replica.info for replica in self._roster if replica.info is not None]

    def find(self, engine_id: str) -> Replica | None:
        """The member that holds this engine now."""
        return self._roster.find(engine_id)

    def connections_broke(self, engine_id: str, peers: Mapping[str, str]) -> None:
        """See `Handshakes.connections_broke`."""
        replica = self._roster.find(engine_id)
        if replica is not None:
            self._handshakes.connections_broke(replica, peers)

    def status(self) -> list[WorkerStatus]:
        """Every worker, prefill first."""
        return [replica.status() for replica in self._roster]

    def targets(self) -> list[PoolTarget]:
        """See `Scaling.targets`."""
        return self._scaling.targets()

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """See `Scaling.scale`; after `start`."""
        return self._scaling.scale(targets)

    async def start(self) -> None:
        """Start all workers and have them meet.

        Raises:
            BatonError: a worker could not start, or no pair of workers can work together.
        """
        replicas = self.replicas
        starts = [asyncio.ensure_future(self._supervisor.start(replica)) for replica in replicas]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        await self._handshakes.check_some_pair_works()
        for replica in replicas:
            replica.life = self._tasks.spawn(self._supervisor.look_after(replica, started=True))

    async def stop(self) -> None:
        """Stop all workers."""
        await self._tasks.cancel_all()
        await asyncio.gather(*(replica.handle.stop() for replica in self._roster), return_exceptions=True)
