"""One request under way, through all the attempts at it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.api import EngineRequest, RequestReport, TokenChunk
from cluster.clock import now
from cluster.errors import LostToAnotherError, WorkerLeavesError, WorkerLostError
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from workers.errors import DeadlineExceededError, HandoffError, RoomLostError
from workers.messages import FinishReason, TokenOutput
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

    def drop_sample(self, attempt: Attempt, index: int) -> None:
        """End one of its samples."""
        ...


class SamplesPartError(Exception):
    """A request of several samples cannot go on as one: they have generated unlike tokens."""


@dataclass(frozen=True)
class Continued:
    """What a request goes on from.

    Attributes:
        output: token ids generated so far.
        arrived: when the request came, monotonic time.
        num_attempts: made so far.
        avoid: pairs on which it has failed.
    """

    output: Sequence[int]
    arrived: float
    num_attempts: int
    avoid: frozenset[tuple[str, str]] = frozenset()


class RunningRequest:
    """One request under way: an asynchronous iterator of `TokenChunk`s.

    Closing it, or leaving it by an exception, cancels the request on both sides. A request whose worker is lost or
    leaves, or whose handoff fails, goes on elsewhere, with the tokens that the client has as part of its prompt: noise
    depends on seed and position alone, and penalties on the tokens, so that the client sees no seam. A request of
    several samples does so as long as none has a token; from then on each has to go on by itself.

    Attributes:
        arrived: when it came, monotonic time.
        attempt: the one under way, or the last one; None: it has not been placed yet.
        num_attempts: at it so far, those left out in which nothing failed.
        avoid: pairs on which it has failed.

    Args:
        attempts: where they begin and end.
        request: what is asked.
        observers: told what happens.
        continued: it goes on after what an earlier request has generated, which had come at that time and made so many
            attempts; None: it is new.

    Raises:
        SamplesPartError: from the iterator, where its samples have to go on each by itself.
    """

    def __init__(
        self,
        attempts: AttemptStarter,
        request: EngineRequest,
        observers: EngineObserver,
        continued: Continued | None = None,
    ) -> None:
        self._starter = attempts
        self._request = request
        self._observers = observers
        self.arrived = now() if continued is None else continued.arrived
        self._deadline = self.arrived + request.timeout_s
        self.attempt: Attempt | None = None
        self._output: list[int] = [] if continued is None else list(continued.output)
        self.num_attempts = 0 if continued is None else continued.num_attempts
        self._started = continued is not None
        self.avoid = frozenset[tuple[str, str]]() if continued is None else continued.avoid
        self._first_report: RequestReport | None = None
        self._over = False
        self._reader: Callable[[], None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def __aiter__(self) -> RunningRequest:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        try:
            chunk = await self._next_chunk()
        except SamplesPartError:
            self._over = True
            self._stop_alarm()
            raise
        except Exception as error:
            self._fail(error)
            raise
        except BaseException:
            await self.aclose()
            raise
        self._output += [token.token_id for token in chunk.tokens]
        if self.attempt is not None and self.attempt.finished and not self._over:
            self._over = True
            self._stop_alarm()
            self._observers.request_finished(self._request, self.attempt)
        return chunk

    def listen(self, reader: Callable[[], None]) -> None:
        """See `PolledStream.listen`."""
        self._reader = reader
        if self.attempt is not None:
            self.attempt.reader = reader

    def poll(self) -> tuple[TokenOutput, ...]:
        """See `PolledStream.poll`."""
        if self._over or self.attempt is None:
            return ()
        tokens = self.attempt.poll()
        for token in tokens:
            self._output.append(token.token_id)
        return tokens

    def wake(self) -> None:
        """See `PolledStream.wake`."""
        if self.attempt is not None:
            self.attempt.wake()

    def fail(self, error: Exception) -> None:
        """See `PolledStream.fail`."""
        if self.attempt is not None:
            self.attempt.fail(error)

    def complete(self) -> None:
        """The text has ended with the tokens so far (a stop string): the request is finished, whatever is under way."""
        if not self._over and self.attempt is not None:
            self._over = True
            self.attempt.finish_reason = FinishReason.STOP
            self._observers.request_finished(self._request, self.attempt)

    async def aclose(self) -> None:
        """Cancel what is under way."""
        if not self._over:
            self._over = True
            self._observers.request_cancelled(self._request, self.attempt)
        self._stop_alarm()
        if self.attempt is not None:
            self._starter.end_attempt(self.attempt)

    def _fail(self, error: Exception) -> None:
        if not self._over:
            self._over = True
            self._observers.request_failed(self._request, self.attempt, error)
        self._stop_alarm()
        if self.attempt is not None:
            self._starter.end_attempt(self.attempt)

    async def report(self) -> RequestReport:
        """Where the request went and where its time went, as far as it is known.

        Raises:
            RuntimeError: it has not been placed yet.
        """
        if self.attempt is None:
            raise RuntimeError("the request has not been placed yet")
        if self.attempt.finished:
            await self.attempt.handoff_reported(REPORT_PATIENCE_S)
        return self.attempt.report()

    def drop(self, index: int) -> None:
        """Nobody wants the rest of this sample; see `TokenStream.drop`."""
        if self.attempt is not None:
            self._starter.drop_sample(self.attempt, index)

    async def _next_chunk(self) -> TokenChunk:
        while True:
            if self.attempt is None:
                self.attempt = await self._start_attempt()
                self.attempt.first_report = self._first_report
                self.attempt.reader = self._reader
            try:
                return await self.attempt.next_chunk()
            except _DeadlinePassedError as error:
                raise DeadlineExceededError(str(error)) from None
            except WorkerLeavesError as error:
                self._observers.request_migrated(self.attempt, error)
                self.num_attempts -= 1  # nothing has failed
            except LostToAnotherError as error:
                self._observers.attempt_failed(self.attempt, error)
                self._observers.request_migrated(self.attempt, error)
                self.num_attempts -= 1  # it has failed nothing itself
            except (WorkerLostError, HandoffError, RoomLostError) as error:
                self._observers.attempt_failed(self.attempt, error)
                if isinstance(error, HandoffError):
                    self.avoid |= {(self.attempt.prefill, self.attempt.decode)}
                    self._starter.handoff_failed(self.attempt)
                if self.num_attempts >= _MAX_ATTEMPTS:
                    raise
                self._observers.request_migrated(self.attempt, error)
            except Exception as error:
                self._observers.attempt_failed(self.attempt, error)
                raise
            if self._output and self._first_report is None:
                self._first_report = self.attempt.report()
            self._starter.end_attempt(self.attempt)
            if self._request.sampling.n > 1 and self._output:
                raise SamplesPartError
            self.attempt = None

    async def _start_attempt(self) -> Attempt:
        again, self._started = self._started, True
        self.num_attempts += 1
        try:
            async with asyncio.timeout(self._deadline - now()):
                attempt = await self._starter.start_attempt(
                    self._request,
                    self._deadline,
                    self.arrived,
                    self.num_attempts,
                    as_token_ids(self._output),
                    again,
                    self.avoid,
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
        if self.attempt is not None:
            self.attempt.fail(_DeadlinePassedError(self._passed))

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
