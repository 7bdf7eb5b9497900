"""The engine: admits requests, sends each to a pair of workers, follows it to its end, starts again where it can."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Mapping

from cluster.api import EngineRequest, PoolTarget, WorkerStatus
from cluster.autoscaling.policy import PoolSignals
from cluster.autoscaling.signals import pool_signals
from cluster.clock import now
from cluster.errors import NoWorkersError, WorkerLeavesError, WorkerLostError
from cluster.gateway.admission import AdmissionQueue, Ticket
from cluster.gateway.attempt import Attempt
from cluster.gateway.dispatch import dispatch
from cluster.gateway.latency_windows import RecentMean, RecentQuantile
from cluster.gateway.request import RunningRequest
from cluster.pools.gpu_budget import GpuBudget
from cluster.pools.groups import Places, PoolLimits
from cluster.pools.pools import WorkerPools
from cluster.pools.router_view import incompatibilities_of, traits_of, ways_of
from cluster.pools.scaling import Obligations
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.router import CandidateReport, NoPlacement, RoutingRequest
from cluster.worker_handle import LoadProgress
from workers.errors import CapacityError
from workers.messages import PrefillReport, StepOutput
from workers.token_ids import NO_TOKENS, TokenIds
from workers.worker_host import WorkerInfo

logger = logging.getLogger(__name__)

_REPORT_PATIENCE_S = 0.25
_MIN_TIMEOUT_S = 0.001
_LATENCY_WINDOW_S = 30.0
WORKERS_SHARE_OF_WAIT = 0.25
"""Enough to keep a prefill worker busy; who waits at the gateway waits in the order of priority and turns."""
_SHUTTING_DOWN = "the service is shutting down"


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
        silence_s: a worker that says nothing for so long is lost; None: only one whose output ends.
        gpus: what bounds the groups besides their limits; None: nothing.
        disaggregation: where prompts may be computed, see `RoutingRequest`; books that are given have their own.
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
        silence_s: float | None = None,
        gpus: GpuBudget | None = None,
        disaggregation: str = "always",
    ) -> None:
        self._pools = WorkerPools(
            prefill,
            decode,
            on_output=self._on_output,
            on_change=self._on_change,
            limits=limits,
            obligations=Obligations(self._num_attempts, self._migrate, lambda: self._load_tracker.needed_roles),
            progress=progress,
            silence_s=silence_s,
            gpus=gpus,
        )
        self._queue: AdmissionQueue[Attempt] = AdmissionQueue(
            max_queue, clock=now, max_wait_s=max_queue_wait_s * (1.0 - WORKERS_SHARE_OF_WAIT)
        )
        self._load_tracker = load_tracker or LoadTracker(
            max_queued_s=max_queue_wait_s * WORKERS_SHARE_OF_WAIT, disaggregation=disaggregation, clock=now
        )
        self._attempts: dict[str, Attempt] = {}
        self._ttft_s = RecentQuantile(_LATENCY_WINDOW_S, now)
        self._itl_s = RecentMean(_LATENCY_WINDOW_S, now)
        self._local_ttft_s = RecentQuantile(_LATENCY_WINDOW_S, now)
        self._prompts_s = {role: RecentMean(_LATENCY_WINDOW_S, now) for role in ("prefill", "decode")}
        self._stopping = False

    async def start(self) -> None:
        """Start all workers; see `WorkerPools.start`."""
        await self._pools.start()

    async def stop(self) -> None:
        """End all requests, those that wait too, then all workers."""
        self._stopping = True
        self._queue.retry()
        for attempt in list(self._attempts.values()):
            attempt.fail(NoWorkersError(_SHUTTING_DOWN))
        await asyncio.sleep(0)
        await self._pools.stop()

    @property
    def max_model_len(self) -> int:
        """The context window that every worker can serve, tokens; after `start`."""
        return min(replica.info.max_model_len for replica in self._pools.replicas if replica.info is not None)

    @property
    def block_sizes(self) -> frozenset[int]:
        """See `Engine.block_sizes`."""
        return self._load_tracker.block_sizes

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return self._pools.infos()

    def workers(self) -> list[WorkerStatus]:
        """See `Engine.workers`."""
        return self._pools.status()

    def explain(self, request: EngineRequest) -> list[CandidateReport]:
        """See `Engine.explain`."""
        return self._load_tracker.explain(_routing_request(request))

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """See `Engine.scale`."""
        return self._pools.scale(targets)

    def signals(self) -> dict[str, PoolSignals]:
        """Each pool as it is now, by role, for who decides on its size."""
        latencies = {"prefill": self._ttft_s.quantile(0.9), "decode": self._itl_s.mean()}
        return pool_signals(
            self._pools.replicas,
            self._pools.targets(),
            latencies,
            {role: work.rate() for role, work in self._prompts_s.items()},
            len(self._queue),
            self._local_ttft_s.quantile(0.9),
        )

    def generate(self, request: EngineRequest) -> RunningRequest:
        """See `Engine.generate`."""
        return RunningRequest(self, request)

    async def start_attempt(
        self,
        request: EngineRequest,
        deadline: float,
        arrived: float,
        attempts: int,
        output: TokenIds = NO_TOKENS,
        again: bool = False,
    ) -> Attempt:
        """Wait for room, choose a pair of workers and send them the request, with what it has generated so far.

        One that is here `again` is not turned away.

        Raises:
            QueueFullError: too many requests are waiting.
            CapacityError: no pair of workers could ever hold the request.
            NoWorkersError: a pool has no worker, and none is likely to come back soon.
        """
        routing_request = _routing_request(request, output)
        attempt = await self._queue.admit(
            lambda: self._try_to_place(request, routing_request, arrived, attempts),
            Ticket(request.priority, request.user, len(request.prompt_token_ids), readmitted=again),
            patience_s=deadline - now(),
        )
        if attempt.error is None:
            try:
                timeout_s = max(_MIN_TIMEOUT_S, deadline - now())
                self._dispatch(attempt, request, output, routing_request.prefix, timeout_s)
            except Exception as error:
                attempt.fail(error)
        return attempt

    def end_attempt(self, attempt: Attempt) -> None:
        """An attempt is over: stop whatever is still under way of it."""
        if self._attempts.pop(attempt.attempt_id, None) is None:
            return
        self._load_tracker.release(attempt.attempt_id)
        if not attempt.finished:
            self._abort(attempt)
        self._queue.retry()

    def _abort(self, attempt: Attempt) -> None:
        for engine_id in (attempt.prefill, attempt.decode):
            replica = self._pools.find(engine_id)
            if replica is not None and replica.state != "lost":
                replica.handle.abort(attempt.attempt_id)

    def _num_attempts(self, engine_id: str) -> int:
        return sum(attempt.needs(engine_id) for attempt in self._attempts.values())

    def _migrate(self, engine_id: str) -> None:
        """A worker leaves before these requests are done: stop them there, and they go on elsewhere."""
        for attempt in [attempt for attempt in self._attempts.values() if attempt.needs(engine_id)]:
            attempt.fail(WorkerLeavesError(f"{engine_id} left before the request was done"))
            self._abort(attempt)

    def _try_to_place(
        self, request: EngineRequest, routing_request: RoutingRequest, arrived: float, attempts: int
    ) -> Attempt | None:
        """Book a pair of workers, or None if there is no room now."""
        if self._stopping:
            raise NoWorkersError(_SHUTTING_DOWN)
        placement = self._load_tracker.place(routing_request)
        if isinstance(placement, NoPlacement):
            if placement.hopeless:
                raise CapacityError(f"no pair of workers can serve this request: {self._why_not(routing_request)}")
            if not all(any(m.may_return for m in self._pools.pool(role)) for role in self._load_tracker.needed_roles):
                raise NoWorkersError(f"no worker is ready: {self._why_not(routing_request)}")
            return None
        attempt = Attempt(
            secrets.token_hex(8),
            placement.prefill or "",
            placement.decode,
            routing_request.prompt_tokens,
            arrived,
            attempts,
            request.user,
            request.request_id,
        )
        if routing_request.max_tokens == 1 and attempt.prefill:  # nothing to decode, so nothing to hand over
            attempt.serve_alone()
        self._attempts[attempt.attempt_id] = attempt
        self._load_tracker.reserve(
            attempt.attempt_id,
            attempt.prefill or None,
            attempt.decode,
            attempt.num_tokens,
            routing_request.max_tokens,
            placement.cached_tokens,
        )
        return attempt

    def _why_not(self, routing_request: RoutingRequest) -> str:
        return "; ".join(self._load_tracker.unsupported_reasons(routing_request))

    def _dispatch(
        self,
        attempt: Attempt,
        request: EngineRequest,
        output: TokenIds,
        prefix: PromptPrefix | None,
        timeout_s: float,
    ) -> None:
        """Send the request to its workers at once."""
        prefill, decode = self._pools.find(attempt.prefill), self._pools.find(attempt.decode)
        if (attempt.prefill and prefill is None) or (attempt.decode and decode is None):
            attempt.fail(WorkerLostError("a worker was lost before the request reached it"))
            return
        dispatch(attempt, request, output, prefix, timeout_s, prefill, decode)

    def _on_output(self, output: StepOutput) -> None:
        self._load_tracker.quarantine(output.engine_id, output.load.quarantined_blocks)
        if output.cache_update is not None:
            self._load_tracker.cache_update(output.engine_id, output.cache_update)
        for event in output.events:
            if attempt := self._attempts.get(event.attempt_id):
                tokens_before, last_token_at = attempt.num_tokens, attempt.last_token_at
                attempt.take(output.engine_id, event)
                self._measure(attempt, last_token_at, attempt.num_tokens - tokens_before)
                if isinstance(event, PrefillReport):
                    self._prompts_s["prefill" if attempt.prefill else "decode"].add(event.prefill_s, 1)
                self._queue.charge(attempt.user, attempt.num_tokens - tokens_before)
                self._track_load(attempt)
                if attempt.finished:
                    self._finish(attempt)
        self._queue.retry()

    def _measure(self, attempt: Attempt, last_token_at: float, num_new: int) -> None:
        """Note what these tokens were for whoever waited for them: for the pools, without the wait at the gateway."""
        if not num_new:
            return
        if last_token_at:
            self._itl_s.add(attempt.last_token_at - last_token_at, num_new)
        else:
            ttft_s = self._ttft_s if attempt.prefill else self._local_ttft_s
            ttft_s.add(attempt.first_token_at - attempt.dispatched)

    def _track_load(self, attempt: Attempt) -> None:
        if attempt.finished:
            self._load_tracker.finished(attempt.attempt_id, attempt.num_tokens)
        elif attempt.first_token_at:
            self._load_tracker.first_token(attempt.attempt_id)
            self._load_tracker.grown(attempt.attempt_id, attempt.num_tokens)

    def _finish(self, attempt: Attempt) -> None:
        """The last token is here: end the attempt, but give the report of the handoff a moment to arrive before."""
        if attempt.reported:
            self.end_attempt(attempt)
        else:
            asyncio.get_running_loop().call_later(_REPORT_PATIENCE_S, self.end_attempt, attempt)

    def _on_change(self, lost: str | None) -> None:
        self._load_tracker.update_pools(
            traits_of(self._pools.pool("prefill")),
            traits_of(self._pools.pool("decode")),
            incompatibilities_of(self._pools.replicas),
            ways_of(self._pools.pool("prefill")),
        )
        if lost is not None:
            for attempt in list(self._attempts.values()):
                attempt.worker_lost(lost)
        self._queue.retry()


def _routing_request(request: EngineRequest, output: TokenIds = NO_TOKENS) -> RoutingRequest:
    """What it needs, or what is left of it after this output."""
    prefix = request.prefix or PromptPrefix(request.prompt_token_ids, request.cache_salt)
    return RoutingRequest(
        len(request.prompt_token_ids) + len(output),
        (request.sampling.max_tokens or 1) - len(output),
        prefix=prefix.followed_by(output) if len(output) else prefix,
    )
