"""Who is told what happens to requests and workers: metrics, traces, the windows that the autoscaler looks at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cluster.api import EngineRequest
from cluster.gateway.attempt import Attempt
from cluster.routing.types import NoPlacement, Placement
from workers.messages import DecodeReport, HandoffReport, PrefillReport, SpansReport

logger = logging.getLogger(__name__)

Received = tuple[Attempt, int, float | None]
"""An attempt, how many more of its tokens are in order, and seconds after those before; None: they are the first."""


class EngineObserver:
    """Is told of events as they happen, on the event loop, and returns at once. A subclass defines those that it wants.

    A request arrives; it waits, if there is no room; its workers are chosen, and an attempt at it is placed on them.
    It has a first token, and others; its workers report. It finishes, fails or is cancelled: one of these, once. An
    attempt that fails is followed by another one (the request migrates) or by the request's failure.
    """

    def request_arrived(self, request: EngineRequest) -> None:
        """A request is here."""

    def request_queued(self, request: EngineRequest) -> None:
        """There is no room for it now, and it waits; again, if it is to migrate and has to wait for that."""

    def router_decided(self, request: EngineRequest, decision: Placement | NoPlacement, seconds: float) -> None:
        """Its workers were chosen, or there are none now, which took so long."""

    def request_placed(self, request: EngineRequest, attempt: Attempt) -> None:
        """An attempt at it begins: its workers will be sent the request; `Attempt.traced` asks them for their spans."""

    def first_token(self, attempt: Attempt) -> None:
        """The attempt's first token is here; see `Attempt.first_token_at`. `tokens_received` follows."""

    def tokens_received(self, received: Sequence[Received]) -> None:
        """What a worker's step has brought, of all attempts at once."""

    def prefill_reported(self, attempt: Attempt, report: PrefillReport) -> None:
        """What its prompt was to the worker that computed it."""

    def handoff_reported(self, attempt: Attempt, report: HandoffReport) -> None:
        """What its handoff moved."""

    def decode_reported(self, attempt: Attempt, report: DecodeReport) -> None:
        """What it was to the worker that decodes it."""

    def spans_reported(self, attempt: Attempt, engine_id: str, report: SpansReport) -> None:
        """When what happened to it on one of its workers, if it is traced; may come after its end."""

    def request_preempted(self, attempt: Attempt) -> None:
        """Its decode worker has moved its blocks to host memory, to make room for others."""

    def attempt_failed(self, attempt: Attempt, error: Exception) -> None:
        """An attempt has failed."""

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """The request goes on elsewhere after this attempt, which failed or whose worker leaves."""

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """Its last token was given to its client, or a stop string was found: `Attempt.finish_reason` says why."""

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """It was closed before its last token: its client left."""

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """It ends in an error; without an attempt: none was placed then."""

    def worker_state_changed(self, engine_id: str, role: str, state: str) -> None:
        """A worker is starting (and goes by its name yet), ready, stalled, draining or lost."""


EVENTS = tuple(name for name, member in vars(EngineObserver).items() if callable(member) and not name.startswith("_"))


class Observers(EngineObserver):
    """Tells each event to those who have defined it; an event that nobody has defined costs an empty call.

    What an observer raises is logged, and hurts neither the request nor the other observers.

    Args:
        observers: to begin with.
    """

    def __init__(self, observers: Iterable[EngineObserver] = ()) -> None:
        self._observers: list[EngineObserver] = []
        self._num_failures: dict[str, int] = {}
        for observer in observers:
            self.add(observer)

    def add(self, observer: EngineObserver) -> None:
        """Tell one more, from now on, after the others."""
        self._observers.append(observer)
        self._bind()

    def remove(self, observer: EngineObserver) -> None:
        """Tell this one nothing more.

        Raises:
            ValueError: it was told nothing before.
        """
        self._observers.remove(observer)
        self._bind()

    def _bind(self) -> None:
        for event in EVENTS:
            self.__dict__.pop(event, None)
            listeners = [getattr(each, event) for each in self._observers if _defines(each, event)]
            if listeners:
                setattr(self, event, self._teller(event, listeners))

    def _teller(self, event: str, listeners: list[Callable[..., None]]) -> Callable[..., None]:
        def tell(*what: Any) -> None:
            for listener in listeners:
                try:
                    listener(*what)
                except Exception:
                    self._on_failure(event, listener)

        return tell

    def _on_failure(self, event: str, listener: Callable[..., None]) -> None:
        """Log the first failure, the second, the fourth … of each: one that always fails must not fill the log."""
        name = f"{getattr(listener, '__qualname__', listener)}"
        count = self._num_failures[name] = self._num_failures.get(name, 0) + 1
        if count & (count - 1) == 0:
            logger.exception("the observer %s failed on %s, %d times so far", name, event, count)


def _defines(observer: EngineObserver, event: str) -> bool:
    return getattr(type(observer), event) is not getattr(EngineObserver, event)
