"""The engine: admits requests, sends each to a pair of workers, follows it to its end, starts again where it can."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Mapping

from cluster.admission import AdmissionQueue, Ticket
from cluster.api import EngineRequest, PoolTarget, WorkerStatus
from cluster.clock import now
from cluster.errors import NoWorkersError, WorkerLeavesError, WorkerLostError
from cluster.flight import Flight
from cluster.latency_windows import RecentMean, RecentQuantile
from cluster.pools.for_router import bars_of, traits_of, ways_of
from cluster.pools.gpu_stock import GpuStock
from cluster.pools.groups import Places, PoolLimits
from cluster.pools.pools import WorkerPools
from cluster.pools.scaling import Obligations
from cluster.pools.signals import pool_signals
from cluster.routing.books import Books
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.router import Demand, NoPlacement, PairReport
from cluster.running_request import RunningRequest
from cluster.scaling_policy import PoolSignals
from cluster.worker_handle import LoadProgress
from workers.errors import CapacityError
from workers.host import WorkerInfo
from workers.messages import DecodeRequest, PrefillReport, PrefillRequest, StepOutput

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
        books: of the two pools, empty; None: books that choose by predicted time.
        progress: told how far loading is.
        silence_s: a worker that says nothing for so long is lost; None: only one whose output ends.
        gpus: what bounds the groups besides their limits; None: nothing.
        disaggregation: where prompts may be computed, see `Demand`; books that are given have their own.
    """

    def __init__(
        self,
        prefill: Places,
        decode: Places,
        *,
        max_queue: int,
        max_queue_wait_s: float = math.inf,
        limits: Mapping[str, PoolLimits] | None = None,
        books: Books | None = None,
        progress: LoadProgress = lambda name, progress: None,
        silence_s: float | None = None,
        gpus: GpuStock | None = None,
        disaggregation: str = "always",
    ) -> None:
        self._pools = WorkerPools(
            prefill,
            decode,
            on_output=self._on_output,
            on_change=self._on_change,
            limits=limits,
            obligations=Obligations(self._num_flights, self._hand_on, lambda: self._books.needed_roles),
            progress=progress,
            silence_s=silence_s,
            gpus=gpus,
        )
        self._queue: AdmissionQueue[Flight] = AdmissionQueue(
            max_queue, clock=now, max_wait_s=max_queue_wait_s * (1.0 - WORKERS_SHARE_OF_WAIT)
        )
        self._books = books or Books(
            max_queued_s=max_queue_wait_s * WORKERS_SHARE_OF_WAIT, disaggregation=disaggregation, clock=now
        )
        self._flights: dict[str, Flight] = {}
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
        for flight in list(self._flights.values()):
            flight.fail(NoWorkersError(_SHUTTING_DOWN))
        await asyncio.sleep(0)
        await self._pools.stop()

    @property
    def max_model_len(self) -> int:
        """The context window that every worker can serve, tokens; after `start`."""
        return min(member.info.max_model_len for member in self._pools.members if member.info is not None)

    @property
    def block_sizes(self) -> frozenset[int]:
        """See `Engine.block_sizes`."""
        return self._books.block_sizes

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return self._pools.infos()

    def workers(self) -> list[WorkerStatus]:
        """See `Engine.workers`."""
        return self._pools.status()

    def explain(self, request: EngineRequest) -> list[PairReport]:
        """See `Engine.explain`."""
        return self._books.explain(_demand(request))

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """See `Engine.scale`."""
        return self._pools.scale(targets)

    def signals(self) -> dict[str, PoolSignals]:
        """Each pool as it is now, by role, for who decides on its size."""
        latencies = {"prefill": self._ttft_s.quantile(0.9), "decode": self._itl_s.mean()}
        return pool_signals(
            self._pools.members,
            self._pools.targets(),
            latencies,
            {role: work.rate() for role, work in self._prompts_s.items()},
            len(self._queue),
            self._local_ttft_s.quantile(0.9),
        )

    def generate(self, request: EngineRequest) -> RunningRequest:
        """See `Engine.generate`."""
        return RunningRequest(self, request)

    async def take_off(
        self,
        request: EngineRequest,
        deadline: float,
        arrived: float,
        attempts: int,
        output: tuple[int, ...] = (),
        again: bool = False,
    ) -> Flight:
        """Wait for room, choose a pair of workers and send them the request, with what it has generated so far.

        One that is here `again` is not turned away.

        Raises:
            QueueFullError: too many requests are waiting.
            CapacityError: no pair of workers could ever hold the request.
            NoWorkersError: a pool has no worker, and none is likely to come back soon.
        """
        demand = _demand(request, output)
        flight = await self._queue.admit(
            lambda: self._try_to_place(request, demand, arrived, attempts),
            Ticket(request.priority, request.user, len(request.prompt_token_ids), readmitted=again),
            patience_s=deadline - now(),
        )
        if flight.error is None:
            try:
                self._dispatch(flight, request, output, max(_MIN_TIMEOUT_S, deadline - now()))
            except Exception as error:
                flight.fail(error)
        return flight

    def land(self, flight: Flight) -> None:
        """A flight is over: stop whatever is still under way of it."""
        if self._flights.pop(flight.flight_id, None) is None:
            return
        self._books.release(flight.flight_id)
        if not flight.finished:
            self._abort(flight)
        self._queue.retry()

    def _abort(self, flight: Flight) -> None:
        for engine_id in (flight.prefill, flight.decode):
            member = self._pools.find(engine_id)
            if member is not None and member.state != "lost":
                member.handle.abort(flight.flight_id)

    def _num_flights(self, engine_id: str) -> int:
        return sum(flight.needs(engine_id) for flight in self._flights.values())

    def _hand_on(self, engine_id: str) -> None:
        """A worker leaves before these requests are done: stop them there, and they go on elsewhere."""
        for flight in [flight for flight in self._flights.values() if flight.needs(engine_id)]:
            flight.fail(WorkerLeavesError(f"{engine_id} left before the request was done"))
            self._abort(flight)

    def _try_to_place(self, request: EngineRequest, demand: Demand, arrived: float, attempts: int) -> Flight | None:
        """Book a pair of workers, or None if there is no room now."""
        if self._stopping:
            raise NoWorkersError(_SHUTTING_DOWN)
        placement = self._books.place(demand)
        if isinstance(placement, NoPlacement):
            if placement.hopeless:
                why = "; ".join(self._books.refusals(demand))
                raise CapacityError(f"no pair of workers can serve this request: {why}")
            if not all(any(m.has_a_future for m in self._pools.pool(role)) for role in self._books.needed_roles):
                raise NoWorkersError("no worker is ready: " + "; ".join(self._books.refusals(demand)))
            return None
        flight = Flight(
            secrets.token_hex(8),
            placement.prefill or "",
            placement.decode,
            demand.prompt_tokens,
            arrived,
            attempts,
            request.user,
        )
        if demand.max_tokens == 1 and flight.prefill:  # nothing to decode, so nothing to hand over
            flight.serve_alone()
        self._flights[flight.flight_id] = flight
        self._books.book(
            flight.flight_id,
            flight.prefill or None,
            flight.decode,
            flight.num_tokens,
            demand.max_tokens,
            placement.cached_tokens,
        )
        return flight

    def _dispatch(self, flight: Flight, request: EngineRequest, output: tuple[int, ...], timeout_s: float) -> None:
        """Send the request to its workers at once."""
        prefill, decode = self._pools.find(flight.prefill), self._pools.find(flight.decode)
        if (flight.prefill and prefill is None) or (flight.decode and decode is None):
            flight.fail(WorkerLostError("a worker was lost before the request reached it"))
            return
        name, handoff_id, after = flight.flight_id, secrets.token_bytes(16), len(output)
        prompt, sampling = request.prompt_token_ids + output, request.sampling
        p_id, d_id = flight.prefill or None, flight.decode or None
        flight.dispatched = now()
        # Prefill first: it is on the way to the first token, and what it computes before the grant comes waits for it.
        if prefill is not None:
            prefill.handle.submit(PrefillRequest(name, handoff_id, prompt, sampling, d_id, timeout_s, after))
        if decode is not None:
            decode.handle.submit(DecodeRequest(name, handoff_id, prompt, sampling, p_id, timeout_s, after))

    def _on_output(self, output: StepOutput) -> None:
        self._books.quarantine(output.engine_id, output.load.quarantined_blocks)
        if output.cache_update is not None:
            self._books.cache_update(output.engine_id, output.cache_update)
        for event in output.events:
            if flight := self._flights.get(event.request_id):
                tokens_before, last_token_at = flight.num_tokens, flight.last_token_at
                flight.take(output.engine_id, event)
                self._measure(flight, last_token_at, flight.num_tokens - tokens_before)
                if isinstance(event, PrefillReport):
                    self._prompts_s["prefill" if flight.prefill else "decode"].add(event.prefill_s, 1)
                self._queue.charge(flight.user, flight.num_tokens - tokens_before)
                self._keep_books(flight)
                if flight.finished:
                    self._see_off(flight)
        self._queue.retry()

    def _measure(self, flight: Flight, last_token_at: float, num_new: int) -> None:
        """Note what these tokens were for whoever waited for them: for the pools, without the wait at the gateway."""
        if not num_new:
            return
        if last_token_at:
            self._itl_s.add(flight.last_token_at - last_token_at, num_new)
        else:
            ttft_s = self._ttft_s if flight.prefill else self._local_ttft_s
            ttft_s.add(flight.first_token_at - flight.dispatched)

    def _keep_books(self, flight: Flight) -> None:
        if flight.finished:
            self._books.finished(flight.flight_id, flight.num_tokens)
        elif flight.first_token_at:
            self._books.first_token(flight.flight_id)
            self._books.grown(flight.flight_id, flight.num_tokens)

    def _see_off(self, flight: Flight) -> None:
        """The last token is here: land, but give the report of the handoff a moment to arrive before."""
        if flight.reported:
            self.land(flight)
        else:
            asyncio.get_running_loop().call_later(_REPORT_PATIENCE_S, self.land, flight)

    def _on_change(self, lost: str | None) -> None:
        self._books.update_pools(
            traits_of(self._pools.pool("prefill")),
            traits_of(self._pools.pool("decode")),
            bars_of(self._pools.members),
            ways_of(self._pools.pool("prefill")),
        )
        if lost is not None:
            for flight in list(self._flights.values()):
                flight.worker_lost(lost)
        self._queue.retry()


def _demand(request: EngineRequest, output: tuple[int, ...] = ()) -> Demand:
    """What it needs, or what is left of it after this output."""
    prefix, max_tokens = request.prefix or PromptPrefix(request.prompt_token_ids), request.sampling.max_tokens or 1
    return Demand(
        len(request.prompt_token_ids) + len(output),
        max_tokens - len(output),
        prefix=prefix.followed_by(output) if output else prefix,
    )
