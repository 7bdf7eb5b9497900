"""Arrival processes and loops, against a client and a clock that follow a script: no real time passes."""

import asyncio
import heapq
import itertools
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from benchmarks.distributions import Fixed
from benchmarks.load import Limits, closed_loop, open_loop, poisson_arrivals
from benchmarks.measure import Row, measure_request
from benchmarks.workload import RequestSpec, Workload
from cluster.api import RequestReport, Usage
from cluster.client.client import BatonClientError
from cluster.client.messages import GenerateChunk
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams


class FakeClock:
    """Time that jumps to whoever wakes next, once everybody else waits."""

    def __init__(self) -> None:
        self.time = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = itertools.count()
        self._driver: asyncio.Task[None] | None = None

    def now(self) -> float:
        return self.time

    async def sleep_until(self, when: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (max(when, self.time), next(self._number), future))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        await future

    async def _drive(self) -> None:
        while self._sleepers:
            for _ in range(20):  # let everybody who can run do so
                await asyncio.sleep(0)
            self.time, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)


class FakeClient:
    """Answers each request with messages of so many tokens after so many seconds, or an error.

    With `slots`, only so many requests are served at a time and the others wait.
    """

    def __init__(
        self,
        clock: FakeClock,
        script: Callable[[int], Sequence[tuple[float, int]] | Exception],
        *,
        slots: int = 10**6,
        report: RequestReport | None = None,
        finish: FinishReason | None = FinishReason.LENGTH,
    ) -> None:
        self._clock = clock
        self._script = script
        self._slots = asyncio.Semaphore(slots)
        self._report = report
        self._finish = finish
        self.under_way = 0
        self.most_under_way = 0
        self.calls: list[dict[str, Any]] = []

    async def generate(self, prompt: str | None = None, **arguments: Any) -> AsyncIterator[GenerateChunk]:
        index = len(self.calls)
        self.calls.append({"prompt": prompt, "at": self._clock.now(), **arguments})
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            async with self._slots:
                script = self._script(index)
                if isinstance(script, Exception):
                    raise script
                for delay, tokens in script:
                    await self._clock.sleep_until(self._clock.now() + delay)
                    yield GenerateChunk("r", "ab", (1,) * tokens, (), None, None, None)
                yield GenerateChunk("r", "", (), (), self._finish, Usage(5, 3), self._report)
        finally:
            self.under_way -= 1


def request(index: int) -> RequestSpec:
    return RequestSpec(index, (1, 2, 3), None, None, SamplingParams(max_tokens=3))


def limits(requests: int | None = None, duration_s: float | None = None) -> Limits:
    return Limits(requests, duration_s, timeout_s=7.0)


def test_poisson_arrivals_have_the_rate_and_the_spread_and_follow_the_seed() -> None:
    times = list(itertools.islice(poisson_arrivals(4.0, seed=1), 20_000))
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)  # exponential: as large as the mean
    assert min(gaps) > 0
    assert times[:50] == list(itertools.islice(poisson_arrivals(4.0, seed=1), 50))
    assert times[:50] != list(itertools.islice(poisson_arrivals(4.0, seed=2), 50))


async def test_open_loop_sends_on_time_however_many_are_under_way() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda index: [(10.0, 1)])
    run = await open_loop(client, request, iter([0.5, 1.0, 1.75]), limits(), clock)
    assert [call["at"] - 100.0 for call in client.calls] == [0.5, 1.0, 1.75]
    assert client.most_under_way == 3
    assert [row.sent_s for row in run.rows] == [0.5, 1.0, 1.75]
    assert [row.ttft_s for row in run.rows] == [10.0, 10.0, 10.0]
    assert run.duration_s == 11.75


async def test_open_loop_counts_waiting_from_when_a_request_was_due() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda index: [(4.0, 1)], slots=1)  # one a second asked of what does one in four
    run = await open_loop(client, request, iter([1.0, 2.0, 3.0]), limits(), clock)
    assert [row.ttft_s for row in run.rows] == [4.0, 7.0, 10.0]
    assert [row.e2e_s for row in run.rows] == [4.0, 7.0, 10.0]


async def test_a_client_that_is_late_itself_hides_nothing() -> None:
    clock = FakeClock()
    row = await measure_request(FakeClient(clock, lambda i: [(1.0, 1)]), request(0), clock, 100.0 - 5.0, 2.0, 7.0)
    assert (row.scheduled_s, row.sent_s, row.ttft_s) == (2.0, 5.0, 4.0)


async def test_open_loop_ends_at_its_limits_and_waits_for_what_is_under_way() -> None:
    for bound, expected in ((limits(requests=2), 2), (limits(duration_s=3.5), 3), (limits(5, 2.5), 2)):
        clock = FakeClock()
        client = FakeClient(clock, lambda index: [(60.0, 1)])
        run = await open_loop(client, request, itertools.count(1.0, 1.0), bound, clock)
        assert len(run.rows) == len(client.calls) == expected
        assert all(row.ok for row in run.rows)


async def test_closed_loop_keeps_so_many_under_way_and_sends_each_request_once() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda index: [(1.0 + index % 3, 1)])
    seen: list[Row] = []
    run = await closed_loop(client, request, 4, limits(requests=25), clock, seen.append)
    assert client.most_under_way == 4
    assert [row.index for row in run.rows] == list(range(25))
    assert sorted(row.index for row in seen) == list(range(25))


async def test_closed_loop_ends_after_its_duration() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda index: [(1.0, 1)])
    run = await closed_loop(client, request, 2, limits(duration_s=3.5), clock)
    assert len(run.rows) == 8  # at 0, 1, 2 and 3 seconds
    assert run.duration_s == 4.0


async def test_a_row_holds_what_the_stream_brought() -> None:
    clock = FakeClock()
    report = RequestReport("p", "d", kv_bytes=7)
    client = FakeClient(clock, lambda index: [(2.0, 1), (0.5, 1), (1.0, 2)], report=report)
    workload = Workload(Fixed(6), Fixed(4), seed=0, vocab_size=50, max_model_len=64)
    spec = workload.request(3)
    row = await measure_request(client, spec, clock, 100.0, 0.0, 7.0)
    assert (row.ttft_s, row.e2e_s, row.tpot_s) == (2.0, 3.5, 0.5)
    assert (row.itl_s, row.longest_gap_s) == ([0.5, 0.5, 0.5], 1.0)
    assert (row.output_tokens, row.prompt_tokens, row.finish_reason) == (4, 5, "length")
    assert (row.ok, row.correct, row.report) == (True, None, report)
    call = client.calls[0]
    assert (call["prompt"], call["token_ids"], call["timeout_s"]) == (None, spec.token_ids, 7.0)
    assert call["sampling"] == spec.sampling


async def test_an_answer_is_checked_where_there_is_one() -> None:
    for answer, right in (("abab", True), ("ba", False)):
        clock = FakeClock()
        client = FakeClient(clock, lambda index: [(1.0, 1), (1.0, 1)])
        spec = RequestSpec(0, None, "prompt", answer, SamplingParams(max_tokens=2))
        row = await measure_request(client, spec, clock, 100.0, 0.0, 7.0)
        assert row.correct is right
        assert client.calls[0]["prompt"] == "prompt"


async def test_errors_become_the_status_of_their_row_alone() -> None:
    clock = FakeClock()
    refused = BatonClientError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    client = FakeClient(clock, lambda index: refused if index % 2 else [(1.0, 1)])
    run = await closed_loop(client, request, 1, limits(requests=6), clock)
    assert [row.status for row in run.rows] == ["OK", "RESOURCE_EXHAUSTED"] * 3
    assert run.rows[1].error == "the queue is full"
    assert run.rows[1].ttft_s is None


async def test_a_stream_without_an_end_is_no_success() -> None:
    clock = FakeClock()
    row = await measure_request(
        FakeClient(clock, lambda i: [(1.0, 1)], finish=None), request(0), clock, 100.0, 0.0, 7.0
    )
    assert row.status == "INCOMPLETE"


async def test_a_defect_of_the_client_is_not_counted_as_a_failed_request() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda index: ZeroDivisionError("defect"))
    with pytest.raises(ExceptionGroup):
        await closed_loop(client, request, 1, limits(requests=2), clock)
