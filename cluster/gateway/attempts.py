"""The attempts under way: placed on workers, followed by what those say, ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.errors import (
    CrashingRequestError,
    LostToAnotherError,
    NoWorkersError,
    WorkerLeavesError,
    WorkerLostError,
)
from cluster.gateway.admission import AdmissionQueue, Ticket
from cluster.gateway.attempt import Attempt
from cluster.gateway.dispatch import dispatch
from cluster.gateway.observers import EngineObserver, Received
from cluster.gateway.suspects import CLEARED_AFTER, Suspects, Turn
from cluster.pools.pools import WorkerPools
from cluster.pools.replica import Loss
from cluster.routing.load_tracker import LoadTracker
from cluster.routing.prefix_index import PromptPrefix
from cluster.routing.types import NoPlacement, RoutingRequest
from workers.errors import CapacityError
from workers.messages import (
    DecodeReport,
    HandoffReport,
    PrefillReport,
    RequestPreempted,
    SpansReport,
    StepOutput,
    TokenOutput,
    WorkerEvent,
)
from workers.token_ids import NO_TOKENS, TokenIds

REPORT_PATIENCE_S = 0.25
"""How long the report of a handoff is waited for whose request has ended."""
_SPANS_PATIENCE_S = 10.0
"""How long spans are taken of a traced attempt that is over: its workers tell them when they have stopped it."""
_MIN_TIMEOUT_S = 0.001
_SHUTTING_DOWN = "the service is shutting down"


@dataclass(eq=False)
class _UnderWay:
    """An attempt, what it is at, and its turn if it is a suspect's and has not been cleared.

    The books are told of its growth when it has `booked_until` tokens or fewer samples run than `booked_running`.
    """

    attempt: Attempt
    request: EngineRequest
    turn: Turn | None
    booked_until: int = 0
    booked_running: int = 0

    def end_turn(self) -> None:
        if self.turn is not None:
            self.turn.end()
        self.turn = None


class Attempts:
    """Every attempt at a request, from its place in the queue to its end.

    Args:
        pools: the workers.
        load_tracker: what each of them has to do.
        queue: who waits for room.
        observers: told what happens.
    """

    def __init__(
        self, pools: WorkerPools, load_tracker: LoadTracker, queue: AdmissionQueue[Attempt], observers: EngineObserver
    ) -> None:
        self._pools = pools
        self._load_tracker = load_tracker
        self._queue = queue
        self._observers = observers
        self._under_way: dict[str, _UnderWay] = {}
        self._over: dict[str, Attempt] = {}
        self._suspects = Suspects(watch=self._watch_all)
        self._stopping = False

    def __len__(self) -> int:
        return len(self._under_way)

    async def start_attempt(
        self,
        request: EngineRequest,
        deadline: float,
        arrived: float,
        attempts: int,
        output: TokenIds = NO_TOKENS,
        again: bool = False,
        avoid: frozenset[tuple[str, str]] = frozenset(),
    ) -> Attempt:
        """Wait for room, choose a pair of workers and send them the request, with what it has generated so far.

        One that is here `again` is not turned away, and goes to none of the pairs to `avoid` if there is another.

        Raises:
            QueueFullError: too many requests are waiting.
            CapacityError: no pair of workers could ever hold the request.
            NoWorkersError: a pool has no worker, and none is likely to come back soon.
            CrashingRequestError: it has crashed two workers.
        """
        self._suspects.check(request)
        routing_request = routing_request_of(request, output, avoid)
        turn = await self._suspects.turn(request)
        try:
            self._suspects.check(request)  # another like it may have had its turn meanwhile
            attempt = await self._queue.admit(
                lambda: self._try_to_place(request, routing_request, arrived, attempts, turn),
                Ticket(
                    request.priority,
                    request.user,
                    len(request.prompt_token_ids),
                    readmitted=again,
                    tenant=request.caller.client,
                    share=request.caller.share,
                ),
                patience_s=deadline - now(),
                on_wait=lambda: self._observers.request_queued(request),
            )
        except BaseException:
            if turn is not None:
                turn.end()
            raise
        if attempt.error is None:
            try:
                timeout_s = max(_MIN_TIMEOUT_S, deadline - now())
                self._dispatch(attempt, request, output, routing_request.prefix, timeout_s)
            except Exception as error:
                attempt.fail(error)
        return attempt

    def end_attempt(self, attempt: Attempt) -> None:
        """An attempt is over: stop whatever is still under way of it."""
        if (ended := self._under_way.pop(attempt.attempt_id, None)) is None:
            return
        ended.end_turn()
        self._load_tracker.release(attempt.attempt_id)
        if attempt.traced:
            self._over[attempt.attempt_id] = attempt
            asyncio.get_running_loop().call_later(_SPANS_PATIENCE_S, self._over.pop, attempt.attempt_id, None)
        if not attempt.finished:
            self._abort(attempt)
        self._queue.retry()

    def drop_sample(self, attempt: Attempt, index: int) -> None:
        """Nobody wants the rest of one of its samples: stop it there."""
        if (under_way := self._under_way.get(attempt.attempt_id)) is not None:
            attempt.drop(index)
            self._abort(attempt, index)
            if attempt.first_token_at:
                self._track_load(under_way)
            self._queue.retry()

    def handoff_failed(self, attempt: Attempt) -> None:
        """Between its two workers: for a while others go there only if there is no better pair."""
        self._load_tracker.handoff_failed(attempt.prefill, attempt.decode)

    def take(self, output: StepOutput) -> None:
        """What a worker has said after a step; who reads its tokens is told when all of them are taken."""
        engine_id, at, received = output.engine_id, now(), list[Received]()
        for event in output.events:
            if under_way := self._under_way.get(event.attempt_id):
                if isinstance(event, TokenOutput):
                    self._take_token(under_way, engine_id, event, at, received)
                else:
                    self._take_event(under_way, engine_id, event)
            elif isinstance(event, SpansReport) and (ended := self._over.get(event.attempt_id)):
                self._observers.spans_reported(ended, engine_id, event)
        if received:
            self._observers.tokens_received(received)
            for attempt, _, _ in received:
                attempt.tell()

    def count(self, engine_id: str) -> int:
        """How many still need this engine."""
        return sum(each.attempt.needs(engine_id) for each in self._under_way.values())

    def migrate(self, engine_id: str) -> None:
        """A worker leaves before these requests are done: stop them there, and they go on elsewhere."""
        for attempt in [each.attempt for each in self._under_way.values() if each.attempt.needs(engine_id)]:
            attempt.fail(WorkerLeavesError(f"{engine_id} left before the request was done"))
            self._abort(attempt)

    def worker_lost(self, loss: Loss) -> None:
        """A worker is gone, and with it what was on it; if it crashed, one of these may be why: see `Suspects`."""
        fallen = [each for each in self._under_way.values() if each.attempt.falls_with(loss.engine_id)]
        guilty = [each for each in fallen if each.turn is not None] if loss.crashed else []
        for each in guilty or fallen if loss.crashed else []:
            self._suspects.crashed(each.request, in_its_turn=bool(guilty))
        what = f"{loss.engine_id} was lost while it served the request"
        for each in fallen:
            if each in guilty:
                each.attempt.fail(CrashingRequestError(f"{what}, as another worker was before; it is not tried again"))
            else:
                each.attempt.fail(LostToAnotherError(what) if guilty else WorkerLostError(what))

    def _watch_all(self) -> Callable[[], bool]:
        """Whether every worker that serves now has been heard since, or is lost."""
        heard = {replica.engine_id: replica.num_heard for replica in self._pools.replicas if replica.serves}
        return lambda: all(
            replica.num_heard > heard[replica.engine_id]
            for replica in self._pools.replicas
            if replica.serves and replica.engine_id in heard
        )

    def stop(self) -> None:
        """End all of them, and place no more."""
        self._stopping = True
        self._queue.retry()
        for each in list(self._under_way.values()):
            each.attempt.fail(NoWorkersError(_SHUTTING_DOWN))

    def _try_to_place(
        self,
        request: EngineRequest,
        routing_request: RoutingRequest,
        arrived: float,
        attempts: int,
        turn: Turn | None,
    ) -> Attempt | None:
        """Reserve a pair of workers, or None if there is no room now."""
        if self._stopping:
            raise NoWorkersError(_SHUTTING_DOWN)
        started = time.perf_counter()
        placement = self._load_tracker.place(routing_request)
        self._observers.router_decided(request, placement, time.perf_counter() - started)
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
            routing_request.num_samples,
            caller=request.caller,
            output_before=routing_request.prompt_tokens - len(request.prompt_token_ids),
        )
        if routing_request.max_tokens == 1 and attempt.prefill:  # nothing to decode, so nothing to hand over
            attempt.serve_alone()
        self._under_way[attempt.attempt_id] = _UnderWay(attempt, request, turn, booked_running=attempt.num_samples)
        self._load_tracker.reserve(
            attempt.attempt_id,
            attempt.prefill or None,
            attempt.decode,
            attempt.num_tokens,
            routing_request.max_tokens,
            placement.cached_tokens,
            attempt.num_samples,
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
        self._observers.request_placed(request, attempt)
        dispatch(attempt, request, output, prefix, timeout_s, prefill, decode)

    def _abort(self, attempt: Attempt, index: int | None = None) -> None:
        for engine_id in (attempt.prefill, attempt.decode):
            replica = self._pools.find(engine_id)
            if replica is not None and replica.state != "lost":
                replica.handle.abort(attempt.attempt_id, index)

    def _take_token(
        self, under_way: _UnderWay, engine_id: str, token: TokenOutput, at: float, received: list[Received]
    ) -> None:
        attempt = under_way.attempt
        is_first = not attempt.first_token_at
        if not (num_new := attempt.take_token(engine_id, token, at)):
            return
        received.append((attempt, num_new, attempt.last_gap_s))
        if is_first:
            self._observers.first_token(attempt)
        if attempt.num_output > under_way.booked_until or attempt.num_running != under_way.booked_running:
            if attempt.num_running < under_way.booked_running and not attempt.finished:
                self._load_tracker.sample_finished(attempt.attempt_id, attempt.num_prompt + attempt.ended_after)
            self._track_load(under_way)
        if under_way.turn is not None and (attempt.finished or attempt.num_output >= CLEARED_AFTER):
            self._suspects.cleared(under_way.request)
            under_way.end_turn()
        if attempt.finished:
            self._finish(attempt)

    def _take_event(self, under_way: _UnderWay, engine_id: str, event: WorkerEvent) -> None:
        attempt = under_way.attempt
        attempt.take(engine_id, event)
        match event:
            case PrefillReport():
                self._observers.prefill_reported(attempt, event)
            case HandoffReport():
                self._observers.handoff_reported(attempt, event)
            case DecodeReport():
                self._observers.decode_reported(attempt, event)
            case SpansReport():
                self._observers.spans_reported(attempt, engine_id, event)
            case RequestPreempted():
                self._observers.request_preempted(attempt)
        if attempt.finished:
            self._finish(attempt)

    def _track_load(self, under_way: _UnderWay) -> None:
        attempt = under_way.attempt
        if attempt.finished:
            self._load_tracker.finished(attempt.attempt_id, attempt.num_tokens)
            return
        self._load_tracker.first_token(attempt.attempt_id)
        room = self._load_tracker.grown(attempt.attempt_id, attempt.num_tokens, attempt.num_running)
        # A token is one of one sample, so that none grows by more than all of them have.
        under_way.booked_until, under_way.booked_running = attempt.num_output + room, attempt.num_running

    def _finish(self, attempt: Attempt) -> None:
        """The last token is here: end the attempt, but give the report of the handoff a moment to arrive before."""
        if attempt.reported:
            self.end_attempt(attempt)
        else:
            asyncio.get_running_loop().call_later(REPORT_PATIENCE_S, self.end_attempt, attempt)


def routing_request_of(
    request: EngineRequest, output: TokenIds = NO_TOKENS, avoid: frozenset[tuple[str, str]] = frozenset()
) -> RoutingRequest:
    """What it needs, or what is left of it after this output; `avoid` are pairs on which it has failed."""
    prefix = request.prefix or PromptPrefix(request.prompt_token_ids, request.cache_salt)
    return RoutingRequest(
        len(request.prompt_token_ids) + len(output),
        (request.sampling.max_tokens or 1) - len(output),
        prefix=prefix.followed_by(output) if len(output) else prefix,
        num_samples=request.sampling.n,
        all_computed=request.sampling.prompt_logprobs is not None and not len(output),
        avoid=avoid,
    )
