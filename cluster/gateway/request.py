"""One request under way, through all the attempts at it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Protocol

from cluster.api import EngineRequest, RequestReport, TokenChunk
from cluster.clock import now
from cluster.errors import WorkerLeavesError, WorkerLostError
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from workers.errors import DeadlineExceededError, HandoffError
from workers.token_ids import TokenIds, as_token_ids

_MAX_ATTEMPTS = 3
REPORT_PATIENCE_S = 0.25
"""How long whoever asks for a report waits for that of the handoff."""


class _DeadlinePassedError(DeadlineExceededError):
    """The gateway's own finding, which is not the attempt's failure."""


class AttemptStarter(Protocol):
    """Where attempts begin and end."""

    async def start_attempt(
        self,
        request: EngineRequest,
        deadline: float,
        arrived: float,
        attempts: int,
        output: TokenIds,
        again: bool,
        avoid: frozenset[tuple[str, str]],
    ) -> Attempt:
        """Begin an attempt that goes on after so much output.

        Args:
            request: what is asked for.
            deadline: seconds on `clock.now`.
            arrived: likewise.
            attempts: how many there have been, this one included.
            output: what the client has.
            again: whether it is not the first.
            avoid: pairs of (prefill, decode) on which its handoff has failed.
        """
        ...

    def handoff_failed(self, attempt: Attempt) -> None:
        """An attempt's handoff has failed, which its pair of workers answers for."""
        ...

    def end_attempt(self, attempt: Attempt) -> None:
        """End one."""
        ...


class RunningRequest:
    """One request under way: an asynchronous iterator of `TokenChunk`s.

    Closing it, or leaving it by an exception, cancels the request on both sides. A request whose worker is lost or
    leaves, or whose handoff fails, goes on elsewhere, with the tokens that the client has as part of its prompt: noise
    depends on seed and position alone, and penalties on the tokens, so that the client sees no seam.
    """

    def __init__(self, attempts: AttemptStarter, request: EngineRequest, observers: EngineObserver) -> None:
        self._starter = attempts
        self._request = request
        self._observers = observers
        self._arrived = now()
        self._deadline = self._arrived + request.timeout_s
        self._attempt: Attempt | None = None
        self._output: list[int] = []
        self._attempts = 0
        self._started = False
        self._avoid: frozenset[tuple[str, str]] = frozenset()
        self._first_report: RequestReport | None = None
        self._over = False
        self._alarm: asyncio.TimerHandle | None = None

    def __aiter__(self) -> RunningRequest:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        try:
            chunk = await self._next_chunk()
        except Exception as error:
            self._fail(error)
            raise
        except BaseException:
            await self.aclose()
            raise
        self._output += [token.token_id for token in chunk.tokens]
        if self._attempt is not None and self._attempt.finished and not self._over:
            self._over = True
            self._stop_alarm()
            self._observers.request_finished(self._request, self._attempt)
        return chunk

    async def aclose(self) -> None:
        """Cancel what is under way."""
        if not self._over:
            self._over = True
            self._observers.request_cancelled(self._request, self._attempt)
        self._stop_alarm()
        if self._attempt is not None:
            self._starter.end_attempt(self._attempt)

    def _fail(self, error: Exception) -> None:
        if not self._over:
            self._over = True
            self._observers.request_failed(self._request, self._attempt, error)
        self._stop_alarm()
        if self._attempt is not None:
            self._starter.end_attempt(self._attempt)

    async def report(self) -> RequestReport:
        """Where the request went and where its time went, as far as it is known.

        Raises:
            RuntimeError: it has not been placed yet.
        """
        if self._attempt is None:
            raise RuntimeError("the request has not been placed yet")
        if self._attempt.finished:
            await self._attempt.handoff_reported(REPORT_PATIENCE_S)
        report, first = self._attempt.report(), self._first_report
        if first is None:
            return report
        return replace(report, queue_s=first.queue_s, prefill_s=first.prefill_s, ttft_s=first.ttft_s)

    async def _next_chunk(self) -> TokenChunk:
        while True:
            if self._attempt is None:
                self._attempt = await self._start_attempt()
            try:
                return await self._attempt.next_chunk()
            except _DeadlinePassedError as error:
                raise DeadlineExceededError(str(error)) from None
            except WorkerLeavesError as error:
                self._observers.request_migrated(self._attempt, error)
                self._attempts -= 1  # nothing has failed
            except (WorkerLostError, HandoffError) as error:
                self._observers.attempt_failed(self._attempt, error)
                if isinstance(error, HandoffError):
                    self._avoid |= {(self._attempt.prefill, self._attempt.decode)}
                    self._starter.handoff_failed(self._attempt)
                if self._attempts >= _MAX_ATTEMPTS:
                    raise
                self._observers.request_migrated(self._attempt, error)
            except Exception as error:
                self._observers.attempt_failed(self._attempt, error)
                raise
            if self._output and self._first_report is None:
                self._first_report = self._attempt.report()
            self._starter.end_attempt(self._attempt)
            self._attempt = None

    async def _start_attempt(self) -> Attempt:
        again, self._started = self._started, True
        self._attempts += 1
        try:
            async with asyncio.timeout(self._deadline - now()):
                attempt = await self._starter.start_attempt(
                    self._request,
                    self._deadline,
                    self._arrived,
                    self._attempts,
                    as_token_ids(self._output),
                    again,
                    self._avoid,
                )
        except TimeoutError:
            raise DeadlineExceededError(self._passed) from None
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_at(self._deadline, self._on_deadline)
        return attempt

    @property
    def _passed(self) -> str:
        return f"the deadline of {self._request.timeout_s:.3g} s passed"

    def _on_deadline(self) -> None:
        """One alarm for the whole request: a timeout around each chunk would cost more than the chunk."""
        if self._attempt is not None:
            self._attempt.fail(_DeadlinePassedError(self._passed))

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
