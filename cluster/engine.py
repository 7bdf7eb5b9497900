"""The engine: admits requests, sends each to a pair of workers, follows it to its end, starts again where it can."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence

from cluster.admission import AdmissionQueue, Ticket
from cluster.api import EngineRequest, RequestReport, TokenChunk, WorkerStatus
from cluster.clock import now
from cluster.errors import NoWorkersError, WorkerLostError
from cluster.flight import Flight
from cluster.pool import Member, WorkerPools
from cluster.routing.books import Books
from cluster.routing.router import Bar, Demand, NoPlacement, PairReport
from cluster.routing.worker_table import WorkerTraits
from cluster.worker_handle import LoadProgress, WorkerHandle
from workers.errors import CapacityError, DeadlineExceededError, HandoffError
from workers.host import WorkerInfo
from workers.messages import DecodeRequest, PrefillRequest, StepOutput

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_REPORT_PATIENCE_S = 0.25
_MIN_TIMEOUT_S = 0.001
_SHUTTING_DOWN = "the service is shutting down"


class ServingEngine:
    """An `Engine` over two pools of workers.

    Args:
        prefill: makes each prefill worker.
        decode: makes each decode worker.
        max_queue: requests that may wait for room.
        books: of the two pools, empty; None: books that choose by predicted time.
        progress: told how far loading is.
    """

    def __init__(
        self,
        prefill: Sequence[Callable[[], WorkerHandle]],
        decode: Sequence[Callable[[], WorkerHandle]],
        *,
        max_queue: int,
        books: Books | None = None,
        progress: LoadProgress = lambda name, progress: None,
    ) -> None:
        self._pools = WorkerPools(
            prefill, decode, on_output=self._on_output, on_change=self._on_change, progress=progress
        )
        self._queue: AdmissionQueue[Flight] = AdmissionQueue(max_queue, clock=now)
        self._books = books or Books()
        self._flights: dict[str, Flight] = {}
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

    def infos(self) -> list[WorkerInfo]:
        """What each worker that has started said of itself, prefill first."""
        return self._pools.infos()

    def workers(self) -> list[WorkerStatus]:
        """See `Engine.workers`."""
        return self._pools.status()

    def explain(self, request: EngineRequest) -> list[PairReport]:
        """See `Engine.explain`."""
        return self._books.explain(_demand(request))

    def generate(self, request: EngineRequest) -> RunningRequest:
        """See `Engine.generate`."""
        return RunningRequest(self, request)

    async def take_off(self, request: EngineRequest, deadline: float, arrived: float, attempts: int) -> Flight:
        """Wait for room, choose a pair of workers and send them the request.

        Raises:
            QueueFullError: too many requests are waiting.
            CapacityError: no pair of workers could ever hold the request.
            NoWorkersError: a pool has no worker, and none is likely to come back soon.
        """
        flight = await self._queue.admit(
            lambda: self._try_to_place(request, arrived, attempts),
            Ticket(request.priority, request.user, len(request.prompt_token_ids)),
            patience_s=deadline - now(),
        )
        if flight.error is None:
            try:
                self._dispatch(flight, request, max(_MIN_TIMEOUT_S, deadline - now()))
            except Exception as error:
                flight.fail(error)
        return flight

    def land(self, flight: Flight) -> None:
        """A flight is over: stop whatever is still under way of it."""
        if self._flights.pop(flight.flight_id, None) is None:
            return
        self._books.release(flight.flight_id)
        if not flight.finished:
            for engine_id in (flight.prefill, flight.decode):
                member = self._pools.find(engine_id)
                if member is not None and member.state != "lost":
                    member.handle.abort(flight.flight_id)
        self._queue.retry()

    def _try_to_place(self, request: EngineRequest, arrived: float, attempts: int) -> Flight | None:
        """Book a pair of workers, or None if there is no room now."""
        if self._stopping:
            raise NoWorkersError(_SHUTTING_DOWN)
        demand = _demand(request)
        placement = self._books.place(demand)
        if isinstance(placement, NoPlacement):
            if placement.hopeless:
                why = "; ".join(self._books.refusals(demand))
                raise CapacityError(f"no pair of workers can serve this request: {why}")
            if not all(any(m.has_a_future for m in self._pools.pool(role)) for role in ("prefill", "decode")):
                raise NoWorkersError("no worker is ready: " + "; ".join(self._books.refusals(demand)))
            return None
        flight = Flight(
            secrets.token_hex(8),
            placement.prefill,
            placement.decode,
            demand.prompt_tokens,
            arrived,
            attempts,
            request.user,
        )
        if demand.max_tokens == 1:  # nothing to decode, so nothing to hand over
            flight.serve_alone()
        self._flights[flight.flight_id] = flight
        self._books.book(flight.flight_id, flight.prefill, flight.decode, flight.num_tokens)
        return flight

    def _dispatch(self, flight: Flight, request: EngineRequest, timeout_s: float) -> None:
        """Send the request to both workers at once."""
        prefill, decode = self._pools.find(flight.prefill), self._pools.find(flight.decode)
        if prefill is None or (decode is None and flight.decode):
            flight.fail(WorkerLostError("a worker was lost before the request reached it"))
            return
        handoff_id = secrets.token_bytes(16)
        prompt, sampling = request.prompt_token_ids, request.sampling
        flight.dispatched = now()
        if decode is None:
            prefill.handle.submit(PrefillRequest(flight.flight_id, handoff_id, prompt, sampling, None, timeout_s))
            return
        # Prefill first: it is on the way to the first token, and what it computes before the grant comes waits for it.
        prefill.handle.submit(PrefillRequest(flight.flight_id, handoff_id, prompt, sampling, flight.decode, timeout_s))
        decode.handle.submit(DecodeRequest(flight.flight_id, handoff_id, prompt, sampling, flight.prefill, timeout_s))

    def _on_output(self, output: StepOutput) -> None:
        self._books.quarantine(output.engine_id, output.load.quarantined_blocks)
        for event in output.events:
            if flight := self._flights.get(event.request_id):
                tokens_before = flight.num_tokens
                flight.take(output.engine_id, event)
                self._queue.charge(flight.user, flight.num_tokens - tokens_before)
                self._keep_books(flight)
                if flight.finished:
                    self._see_off(flight)
        self._queue.retry()

    def _keep_books(self, flight: Flight) -> None:
        if flight.finished:
            self._books.release(flight.flight_id)
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
            _traits(self._pools.pool("prefill")), _traits(self._pools.pool("decode")), _bars(self._pools.members)
        )
        if lost is not None:
            for flight in list(self._flights.values()):
                flight.worker_lost(lost)
        self._queue.retry()


def _demand(request: EngineRequest) -> Demand:
    return Demand(len(request.prompt_token_ids), request.sampling.max_tokens or 1)


def _traits(members: Iterable[Member]) -> dict[WorkerTraits, bool]:
    """The workers that have said who they are, and whether each is ready."""
    return {
        WorkerTraits(
            engine_id=member.engine_id,
            max_model_len=info.max_model_len,
            block_size=info.engine.layout.block_size,
            total_blocks=info.num_blocks,
            max_num_seqs=info.max_num_seqs,
            capability=info.capability,
        ): member.state == "ready"
        for member in members
        if (info := member.info) is not None
    }


def _bars(members: Iterable[Member]) -> dict[tuple[str, str], Bar]:
    """The pairs that cannot work together, whichever of the two has found out."""
    bars: dict[tuple[str, str], Bar] = {}
    for member in members:
        known = [(peer, Bar(why, forever=False)) for peer, why in member.estranged.items()]
        known += [(peer, Bar(why, forever=True)) for peer, why in member.refusals.items()]
        for peer, bar in known:
            prefill, decode = (member.engine_id, peer) if member.handle.role == "prefill" else (peer, member.engine_id)
            bars[prefill, decode] = bar
    return bars


class RunningRequest:
    """One request under way: an asynchronous iterator of `TokenChunk`s.

    Closing it, or leaving it by an exception, cancels the request on both sides. A request whose worker is lost, or
    whose handoff fails, before its first token left starts again on other workers.
    """

    def __init__(self, engine: ServingEngine, request: EngineRequest) -> None:
        self._engine = engine
        self._request = request
        self._arrived = now()
        self._deadline = self._arrived + request.timeout_s
        self._flight: Flight | None = None
        self._delivered = False
        self._over = False

    def __aiter__(self) -> RunningRequest:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._deadline - now()):
                chunk = await self._next_chunk()
        except TimeoutError:
            await self.aclose()
            raise DeadlineExceededError(f"the deadline of {self._request.timeout_s:.3g} s passed") from None
        except BaseException:
            await self.aclose()
            raise
        self._delivered = True
        if self._flight is not None and self._flight.finished:
            self._over = True
        return chunk

    async def aclose(self) -> None:
        """Cancel what is under way."""
        self._over = True
        if self._flight is not None:
            self._engine.land(self._flight)

    async def report(self) -> RequestReport:
        """Where the request went and where its time went, as far as it is known.

        Raises:
            RuntimeError: it has not been placed yet.
        """
        if self._flight is None:
            raise RuntimeError("the request has not been placed yet")
        if self._flight.finished:
            await self._flight.handoff_reported(_REPORT_PATIENCE_S)
        return self._flight.report()

    async def _next_chunk(self) -> TokenChunk:
        attempts = self._flight.attempts if self._flight is not None else 0
        while True:
            if self._flight is None:
                attempts += 1
                self._flight = await self._engine.take_off(self._request, self._deadline, self._arrived, attempts)
            try:
                return await self._flight.next_chunk()
            except (WorkerLostError, HandoffError) as error:
                if self._delivered or attempts >= _MAX_ATTEMPTS:
                    raise
                logger.info("request %s starts again: %s", self._request.request_id, error)
                self._engine.land(self._flight)
                self._flight = None
