"""One request, sent and timed as its client sees it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from benchmarks.workload import RequestSpec
from cluster.api import RequestReport
from cluster.client.client import BatonClientError
from cluster.client.messages import GenerateChunk
from workers.errors import BatonError
from workers.sampling_params import SamplingParams

OK = "OK"


class Client(Protocol):
    """What is measured; `AsyncBatonClient` is one."""

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[GenerateChunk]:
        """Generate part by part."""
        ...


class Clock(Protocol):
    """Seconds that only go forward."""

    def now(self) -> float:
        """The time."""
        ...

    async def sleep_until(self, when: float) -> None:
        """Return at `when`, or at once if it has passed."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.perf_counter()

    async def sleep_until(self, when: float) -> None:
        """See `Clock.sleep_until`."""
        await asyncio.sleep(max(0.0, when - self.now()))


@dataclass
class Row:
    """What was measured of one request. Times are seconds after the run began, durations seconds.

    Attributes:
        index: of the request.
        scheduled_s: when it should have been sent: latencies count from here.
        sent_s: when it was.
        status: OK, or the gRPC status, or the name of the error.
        error: the error's text.
        first_token_s: when the message with the first token came; None if none did.
        last_token_s: when the message with the last token came.
        ended_s: when the stream ended.
        prompt_tokens: as the server counted them; 0 if it did not come to that.
        output_tokens: token ids received.
        itl_s: one interval for each token after the first; see `intervals`.
        longest_gap_s: the longest time between two messages that carried tokens.
        finish_reason: stop or length.
        correct: whether the answer was the right one, where there is one.
        report: the server's account of where the time went.
    """

    index: int
    scheduled_s: float
    sent_s: float
    status: str = OK
    error: str = ""
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    itl_s: list[float] = field(default_factory=list)
    longest_gap_s: float = 0.0
    finish_reason: str | None = None
    correct: bool | None = None
    report: RequestReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the request succeeded."""
        return self.status == OK

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from when the request was scheduled."""
        return None if self.first_token_s is None else self.first_token_s - self.scheduled_s

    @property
    def e2e_s(self) -> float:
        """From when the request was scheduled to the end of its stream."""
        return self.ended_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


def intervals(arrivals: Sequence[tuple[float, int]]) -> list[float]:
    """Inter-token latencies of a stream: one for each token but the first.

    A message that brings k tokens a time g after the one before it counts as k intervals of g / k, so that the
    intervals add up to the time from the first token to the last. Tokens that come in the same message as the first
    have an interval of 0.

    Args:
        arrivals: (time, tokens) of each message that carries tokens, in order.
    """
    found: list[float] = []
    previous: float | None = None
    for at, count in arrivals:
        found += [0.0] * (count - 1) if previous is None else [(at - previous) / count] * count
        previous = at
    return found


async def measure_request(
    client: Client, spec: RequestSpec, clock: Clock, started: float, scheduled_s: float, timeout_s: float
) -> Row:
    """Send a request now and time its stream; an error becomes the row's status.

    Args:
        client: sends it.
        spec: the request.
        clock: to time it by.
        started: the clock when the run began.
        scheduled_s: when the request was due, seconds after that.
        timeout_s: its deadline.
    """
    row = Row(spec.index, scheduled_s, clock.now() - started)
    arrivals: list[tuple[float, int]] = []
    text = ""
    stream = client.generate(
        spec.text,
        token_ids=spec.token_ids,
        sampling=spec.sampling,
        request_id=f"bench-{spec.index}",
        timeout_s=timeout_s,
    )
    try:
        async with aclosing(cast(Any, stream)) as chunks:
            async for chunk in chunks:
                if chunk.token_ids:
                    arrivals.append((clock.now() - started, len(chunk.token_ids)))
                text += chunk.text
                _note_end(row, chunk)
    except BatonClientError as error:
        row.status, row.error = error.status.name, str(error)
    except BatonError as error:
        row.status, row.error = type(error).__name__, str(error)
    row.ended_s = clock.now() - started
    if row.ok and row.finish_reason is None:
        row.status, row.error = "INCOMPLETE", "the stream ended without a finish reason"
    _note_arrivals(row, arrivals)
    if spec.answer is not None and row.ok:
        row.correct = text.strip().startswith(spec.answer)
    return row


def _note_end(row: Row, chunk: GenerateChunk) -> None:
    if chunk.finish_reason is not None:
        row.finish_reason = chunk.finish_reason.value
    if chunk.usage is not None:
        row.prompt_tokens = chunk.usage.prompt_tokens
    if chunk.report is not None:
        row.report = chunk.report


def _note_arrivals(row: Row, arrivals: Sequence[tuple[float, int]]) -> None:
    if not arrivals:
        return
    times = [at for at, _ in arrivals]
    row.first_token_s, row.last_token_s = times[0], times[-1]
    row.output_tokens = sum(count for _, count in arrivals)
    row.itl_s = intervals(arrivals)
    row.longest_gap_s = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
