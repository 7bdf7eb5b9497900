"""The engine: two pools of workers, and the requests that are served by them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.api import EngineRequest, PoolTarget, WorkerStatus
from cluster.autoscaling.policy import PoolSignals
from cluster.autoscaling.signals import pool_signals
from cluster.clock import now
from cluster.gateway.admission import AdmissionQueue
from cluster.gateway.attempt import Attempt
from cluster.gateway.attempts import Attempts, routing_request_of
from cluster.gateway.fairness import TokenCharges
from cluster.gateway.latency_windows import LatencyWindows
from cluster.gateway.observers import EngineObserver, Observers
from cluster.gateway.request import RunningRequest
from cluster.gateway.request_log import RequestLog
from cluster.gateway.sampled_request import SampledRequest
from cluster.pools.gpu_budget import GpuBudget
from cluster.pools.groups import Places, PoolLimits
from cluster.pools.patience import Patience
from cluster.pools.pools import WorkerPools
from cluster.pools.replica import Loss
from cluster.pools.router_view import incompatibilities_of, links_of, traits_of
from cluster.pools.scaling import Obligations
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.types import CandidateReport
from cluster.worker_handle import LoadProgress
from workers.messages import StepOutput
from workers.worker_host import WorkerInfo

WORKERS_SHARE_OF_WAIT = 0.25
"""Enough to keep a prefill worker busy; who waits at the gateway waits in the order of priority and turns."""


class ServingEngine:
    """An `Engine` over two pools of workers.

    Args:
        prefill: makes a prefill worker for each place in the pool.
        decode: makes a decode worker for each place in the pool.
        max_queue: requests that may wait for room.
        max_queue_wait_s: the longest that one may wait before its prompt is computed, at the gateway and on its prefill
            worker together; who would wait longer is refused, see `AdmissionQueue`.
        limits: of the groups' sizes, by key; one that is not named has all its places held.
        load_tracker: of the two pools, empty; None: books that choose by predicted time.
        progress: told how far loading is.
        patience: with workers that are silent or do not get on; None: only one whose output ends is lost, or hangs.
        gpus: what bounds the groups besides their limits; None: nothing.
        tokenizer: the digest of the one that prompts are made with, which the workers must have been loaded beside;
            None: nobody compares them.
        disaggregation: where prompts may be computed, see `RoutingRequest`; books that are given have their own.
        observers: told what happens, besides the engine's own.
    """

    def __init__(
        self,
        prefill: Places,
        decode: Places,
        *,
        max_queue: int,
        max_queue_wait_s: float = math.inf,
        limits: Mapping[str, PoolLimits] | None = None,
        load_tracker: LoadTracker | None = None,
        progress: LoadProgress = lambda name, progress: None,
        patience: Patience | None = None,
        gpus: GpuBudget | None = None,
        tokenizer: str | None = None,
        disaggregation: str = "always",
        observers: Sequence[EngineObserver] = (),
    ) -> None:
        self._queue: AdmissionQueue[Attempt] = AdmissionQueue(
            max_queue, clock=now, max_wait_s=max_queue_wait_s * (1.0 - WORKERS_SHARE_OF_WAIT)
        )
        self._load_tracker = load_tracker or LoadTracker(
            max_queued_s=max_queue_wait_s * WORKERS_SHARE_OF_WAIT, disaggregation=disaggregation, clock=now
        )
        self._latencies = LatencyWindows(now)
        self._observers = Observers([self._latencies, TokenCharges(self._queue.charge), RequestLog(), *observers])
        self._pools = WorkerPools(
            prefill,
            decode,
            on_output=self._on_output,
            on_change=self._on_change,
            on_state=lambda *change: self._observers.worker_state_changed(*change),
            limits=limits,
            obligations=Obligations(
                lambda engine_id: self._attempts.count(engine_id),
                lambda engine_id: self._attempts.migrate(engine_id),
                lambda: self._load_tracker.needed_roles,
            ),
            progress=progress,
            patience=patience,
            tokenizer=tokenizer,
            gpus=gpus,
        )
        self._attempts = Attempts(self._pools, self._load_tracker, self._queue, self._observers)

    async def start(self) -> None:
        """Start all workers; see `WorkerPools.start`."""
        await self._pools.start()

    async def stop(self) -> None:
        """End all requests, those that wait too, then all workers."""
        self._attempts.stop()
        await asyncio.sleep(0)
        await self._pools.stop()

    def observe(self, observer: EngineObserver) -> None:
        """Tell one more what happens, from now on."""
        self._observers.add(observer)

    def dismiss(self, observer: EngineObserver) -> None:
        """Tell this one no more.

        Raises:
            ValueError: it was not told before.
        """
        self._observers.remove(observer)

    @property
    def max_model_len(self) -> int:
        """The context window that every worker can serve, tokens; after `start`."""
        return min(replica.info.max_model_len for replica in self._pools.replicas if replica.info is not None)

    @property
    def block_sizes(self) -> frozenset[int]:
        """See `Engine.block_sizes`."""
        return self._load_tracker.block_sizes

    @property
    def cache_identity(self) -> bytes:
        """See `Engine.cache_identity`."""
        return self._pools.identity_digest

    @property
    def needed_roles(self) -> tuple[str, ...]:
        """The pools that have to have a worker."""
        return tuple(self._load_tracker.needed_roles)

    @property
    def pools(self) -> WorkerPools:
        """The workers that it serves with."""
        return self._pools

    @property
    def num_queued(self) -> int:
        """Requests that wait for room."""
        return len(self._queue)

    @property
    def num_attempts(self) -> int:
        """Attempts at requests that are under way."""
        return len(self._attempts)

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return self._pools.infos()

    def workers(self) -> list[WorkerStatus]:
        """See `Engine.workers`."""
        return self._pools.status()

    def explain(self, request: EngineRequest) -> list[CandidateReport]:
        """See `Engine.explain`."""
        return self._load_tracker.explain(routing_request_of(self._salted(request)))

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """See `Engine.scale`."""
        return self._pools.scale(targets)

    def signals(self) -> dict[str, PoolSignals]:
        """Each pool as it is now, by role, for who decides on its size."""
        return pool_signals(
            self._pools.replicas,
            self._pools.targets(),
            self._latencies.latencies_s,
            self._latencies.prompt_work,
            len(self._queue),
            self._latencies.local_ttft_s,
        )

    def generate(self, request: EngineRequest) -> RunningRequest | SampledRequest:
        """See `Engine.generate`."""
        request = self._salted(request)
        self._observers.request_arrived(request)
        kind = RunningRequest if request.sampling.n == 1 else SampledRequest
        return kind(self._attempts, request, self._observers)

    def _salted(self, request: EngineRequest) -> EngineRequest:
        """A request whose blocks are known by what they hold and by whose they are."""
        return replace(request, cache_salt=self.cache_identity + request.cache_salt)

    def _on_output(self, output: StepOutput) -> None:
        self._load_tracker.quarantine(output.engine_id, output.load.quarantined_blocks)
        self._load_tracker.pace(output.engine_id, output.load.prefill_pace, output.load.decode_pace)
        if output.cache_update is not None:
            self._load_tracker.cache_update(output.engine_id, output.cache_update)
        if output.broken_peers:  # before a request that failed for it is placed again
            self._pools.connections_broke(output.engine_id, output.broken_peers)
        self._attempts.take(output)
        self._queue.retry()

    def _on_change(self, lost: Loss | None) -> None:
        self._load_tracker.update_pools(
            traits_of(self._pools.pool("prefill")),
            traits_of(self._pools.pool("decode")),
            incompatibilities_of(self._pools.replicas),
            links_of(self._pools.pool("prefill")),
        )
        if lost is not None:
            self._attempts.worker_lost(lost)
        self._queue.retry()
