"""What has happened lately, in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.api import EngineRequest
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver, Received
from cluster.live.requests import LiveRequest
from cluster.live.seconds import Seconds
from cluster.routing.types import NoPlacement, Placement
from workers.messages import HandoffReport

_KEPT_REQUESTS, _KEPT_HANDOFFS, _KEPT_EVENTS = 60, 120, 60


@dataclass(frozen=True)
class Objectives:
    """What makes a request good: its first token, and then the mean time between tokens, in so many seconds."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass
class Totals:
    """Since the start."""

    requests: int = 0
    finished: int = 0
    good: int = 0
    cancelled: int = 0
    failed: int = 0
    migrations: int = 0
    tokens: int = 0
    handoffs: int = 0
    kv_bytes: int = 0


class LiveHistory(EngineObserver):
    """Remembers the last minutes: rates and latencies by second, the last requests, handoffs and events.

    Args:
        objectives: what counts as good.
        clock: seconds, monotonic.
    """

    def __init__(self, objectives: Objectives, clock: Callable[[], float] = time.monotonic) -> None:
        self.objectives = objectives
        self.started = time.time()
        self.seconds = Seconds(clock)
        self.totals = Totals()
        self.requests: deque[LiveRequest] = deque(maxlen=_KEPT_REQUESTS)
        self.handoffs: deque[dict[str, Any]] = deque(maxlen=_KEPT_HANDOFFS)
        self.events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)
        self._by_request: dict[EngineRequest, LiveRequest] = {}
        self._by_attempt: dict[str, LiveRequest] = {}
        self._draining: set[str] = set()
        self._num_noted = 0
        self._tokens_counted = 0

    @property
    def under_way(self) -> list[LiveRequest]:
        """The requests that have not ended, oldest first."""
        return list(self._by_request.values())

    def count_tokens(self) -> None:
        """Give this second the tokens that have come since the last call: each token costs one addition, no clock."""
        self.seconds.current.tokens += self.totals.tokens - self._tokens_counted
        self._tokens_counted = self.totals.tokens

    def note(self, text: str, kind: str = "info") -> None:
        """Something that whoever looks should know; `kind` is info, good or bad."""
        self._num_noted += 1
        self.events.append({"number": self._num_noted, "at": time.time(), "kind": kind, "text": text})

    def request_arrived(self, request: EngineRequest) -> None:
        """See `EngineObserver.request_arrived`."""
        self.totals.requests += 1
        self.seconds.current.arrived += 1
        live = LiveRequest.of(self.totals.requests, request, time.time())
        self._by_request[request] = live
        self.requests.append(live)

    def router_decided(self, request: EngineRequest, decision: Placement | NoPlacement, seconds: float) -> None:
        """See `EngineObserver.router_decided`."""
        if isinstance(decision, Placement) and (live := self._by_request.get(request)) is not None:
            live.placement = decision

    def request_placed(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_placed`."""
        if (live := self._by_request.get(request)) is not None:
            live.attempt, live.state = attempt, "prefill"
            self._by_attempt[attempt.attempt_id] = live

    def first_token(self, attempt: Attempt) -> None:
        """See `EngineObserver.first_token`."""
        if (live := self._by_attempt.get(attempt.attempt_id)) is not None and not live.ended:
            live.state = "handoff" if attempt.prefill and attempt.decode and not attempt.reported else "decode"
        if not attempt.output_before:
            self.seconds.current.ttft_s.append(attempt.first_token_at - attempt.arrived)

    def tokens_received(self, received: Sequence[Received]) -> None:
        """See `EngineObserver.tokens_received`."""
        self.totals.tokens += sum(num_tokens for _, num_tokens, _ in received)

    def handoff_reported(self, attempt: Attempt, report: HandoffReport) -> None:
        """See `EngineObserver.handoff_reported`."""
        second = self.seconds.current
        self.totals.handoffs += 1
        self.totals.kv_bytes += report.num_bytes
        second.handoffs += 1
        second.kv_bytes += report.num_bytes
        if (live := self._by_attempt.get(attempt.attempt_id)) is not None and live.state == "handoff":
            live.state = "decode"
        self.handoffs.append(
            {
                "number": self.totals.handoffs,
                "at": time.time(),
                "id": attempt.request_id,
                "prefill": attempt.prefill,
                "decode": attempt.decode,
                "bytes": report.num_bytes,
                "writes": report.num_parts,
                "transfer_s": report.transfer_s,
                "exposed_s": report.exposed_s,
            }
        )

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.request_migrated`."""
        self.totals.migrations += 1
        if (live := self._by_attempt.pop(attempt.attempt_id, None)) is not None:
            live.migrations += 1
            live.state = "queued"
        self.note(f"request {attempt.request_id} goes on elsewhere: {error}", "bad")

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_finished`."""
        second, objectives = self.seconds.current, self.objectives
        report = attempt.report()
        num_output = attempt.num_tokens - len(request.prompt_token_ids)
        decode_s = attempt.last_token_at - attempt.arrived - report.ttft_s
        tpot_s = decode_s / (num_output - 1) if num_output > 1 else 0.0
        if num_output > 1:
            second.tpot_s.append(tpot_s)
        good = report.ttft_s <= objectives.ttft_s and tpot_s <= objectives.tpot_s
        second.finished += 1
        second.good += good
        self.totals.finished += 1
        self.totals.good += good
        self._end(request, attempt, attempt.finish_reason.value if attempt.finish_reason is not None else "stop")

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """See `EngineObserver.request_cancelled`."""
        self.totals.cancelled += 1
        self._end(request, attempt, "abort")

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """See `EngineObserver.request_failed`."""
        self.totals.failed += 1
        self.seconds.current.failed += 1
        if (live := self._by_request.get(request)) is not None:
            live.error = f"{type(error).__name__.removesuffix('Error')}: {error}"
        self._end(request, attempt, "error")

    def worker_state_changed(self, engine_id: str, role: str, state: str) -> None:
        """See `EngineObserver.worker_state_changed`."""
        texts = {
            "starting": ("is starting", "info"),
            "ready": ("is ready", "good"),
            "stalled": ("gets no requests: its step takes far too long", "bad"),
            "draining": ("drains: it finishes what it has", "info"),
            "lost": ("is gone", "bad"),
        }
        text, kind = texts.get(state, (f"is {state}", "info"))
        if state == "draining":
            self._draining.add(engine_id)
        elif engine_id in self._draining:
            self._draining.discard(engine_id)
            text, kind = ("has left", "info") if state == "lost" else ("stays after all", "good")
        self.note(f"{engine_id.partition('.')[0]} {text}", kind)

    def _end(self, request: EngineRequest, attempt: Attempt | None, state: str) -> None:
        live = self._by_request.pop(request, None)
        if live is not None:
            live.state, live.ended, live.request = state, time.time(), None
        if attempt is not None:
            self._by_attempt.pop(attempt.attempt_id, None)
