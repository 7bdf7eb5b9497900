"""Whether the service can answer a request, found out by answering one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from cluster.api import EngineRequest, TokenStream, WorkerStatus
from cluster.clock import now
from cluster.config.group_key import group_key
from cluster.gateway.observers import EngineObserver, Received
from workers.errors import DeadlineExceededError
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

_MOST_URGENT = -(2**31)
_BUSY_TIMEOUTS = 6
"""Canaries in a row that may come too late while other requests get tokens: the service is busy, and not yet broken."""


@dataclass(frozen=True)
class Health:
    """How the service is.

    Attributes:
        ready: a request that comes now is likely to be answered.
        reason: why not, or which groups are missed; empty: all is well.
        groups: by group of workers, such as decode or decode.h100: what it lacks; empty: it has a ready worker.
    """

    ready: bool = False
    reason: str = "no request has passed through the workers yet"
    groups: Mapping[str, str] = field(default_factory=dict)


WELL = Health(True, "")


class ObservedEngine(Protocol):
    """What is needed of the engine."""

    @property
    def needed_roles(self) -> Iterable[str]:
        """The pools that have to have a worker."""
        ...

    def workers(self) -> list[WorkerStatus]:
        """Every worker."""
        ...

    def generate(self, request: EngineRequest) -> TokenStream:
        """Run one request."""
        ...

    def observe(self, observer: EngineObserver) -> None:
        """Tell one more what happens."""
        ...


class Readiness(EngineObserver):
    """Follows the pools and the requests.

    A pool that is needed and has no ready worker makes the service not ready at once. Otherwise a request that has
    passed through prefill, handoff and decode since the last look shows that it is ready; where none has, a canary is
    sent: a prompt of one token, before all that wait, whose second token is decoded behind a handoff.

    Args:
        engine: whose workers and requests are followed.
        interval_s: from one look to the next; a change of a worker's state is looked at when it happens.
        timeout_s: a canary that is not answered by then has failed; may be changed.
    """

    def __init__(self, engine: ObservedEngine, interval_s: float = 5.0, timeout_s: float = 10.0) -> None:
        self._engine = engine
        self._interval_s = interval_s
        self.timeout_s = timeout_s
        self._health = Health()
        self._looked_at = now()
        self._passed = False
        self._any_token = False
        self._timeouts = 0
        self._canary = ""
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        engine.observe(self)

    @property
    def health(self) -> Health:
        """As last found."""
        return self._health

    async def follow(self) -> AsyncIterator[Health]:
        """How the service is, now and after each change."""
        while True:
            self._changed = changed = self._changed if not self._changed.is_set() else asyncio.Event()
            yield self._health
            await changed.wait()

    def look(self) -> None:
        """Do not wait for the next look's time."""
        self._wake.set()

    async def run(self) -> None:
        """Look after it, for ever."""
        while True:
            self._wake.clear()
            if not self._look():
                if self._passed:
                    self._timeouts = 0
                    self._find(True)
                else:
                    await self._send_canary()
            self._looked_at, self._passed, self._any_token = now(), False, False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()

    def tokens_received(self, received: Sequence[Received]) -> None:
        """A request has had its first token and another one since the last look: the way through is free."""
        if self._passed:  # and with it some token has come
            return
        for attempt, _, seconds in received:
            if attempt.request_id != self._canary:
                self._any_token = True
                if seconds is not None and attempt.first_token_at >= self._looked_at:
                    self._passed = True

    def worker_state_changed(self, engine_id: str, role: str, state: str) -> None:
        """Somebody is missing, or is here again."""
        self._look()
        self.look()

    def _look(self) -> bool:
        """Whether a pool that is needed lacks a ready worker, which is known at once."""
        missing = _missing(self._engine.workers())
        for role in self._engine.needed_roles:
            lacking = [text for key, text in missing.items() if key.partition(".")[0] == role]
            served = any(not text for text in lacking)
            if not served:
                self._find(False, "; ".join(lacking) or f"there is no {role} worker")
                return True
        if self._health.ready:
            self._find(True)
        return False

    async def _send_canary(self) -> None:
        self._canary = f"canary-{secrets.token_hex(8)}"
        request = EngineRequest(
            request_id=self._canary,
            sampling=SamplingParams(temperature=0.0, seed=0, max_tokens=2, ignore_eos=True),
            timeout_s=self.timeout_s,
            priority=_MOST_URGENT,
            prompt_token_ids=as_token_ids([0]),
        )
        try:
            async with aclosing(self._engine.generate(request)) as stream:
                async for _ in stream:
                    pass
        except Exception as error:
            late = isinstance(error, DeadlineExceededError)
            self._timeouts = self._timeouts + 1 if late else 0
            if late and self._any_token and self._timeouts < _BUSY_TIMEOUTS:
                return
            if not self._look():
                self._find(False, f"a canary request failed: {str(error) or type(error).__name__}")
        else:
            self._timeouts = 0
            if not self._look():
                self._find(True)

    def _find(self, ready: bool, reason: str = "") -> None:
        groups = _missing(self._engine.workers())
        health = Health(ready, reason or "; ".join(text for text in groups.values() if text), groups)
        if health != self._health:
            self._health = health
            self._changed.set()


def _missing(workers: Iterable[WorkerStatus]) -> dict[str, str]:
    """By group, that none of its workers is ready, and what they are instead; empty: one is."""
    states: dict[str, list[str]] = {}
    for worker in workers:
        states.setdefault(group_key(worker.role, worker.group), []).append(worker.state)
    return {
        key: "" if "ready" in each else f"{key}: none of {len(each)} workers is ready ({', '.join(sorted(set(each)))})"
        for key, each in states.items()
    }
