"""Who observes the engine is told everything once and in order, and cannot hurt a request."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import pytest

from cluster.errors import WorkerLeavesError, WorkerLostError
from cluster.gateway.observers import EVENTS, EngineObserver, Observers
from cluster.pools.groups import PoolLimits
from fleet import prompt, tokens_of
from workers.errors import CapacityError, DeadlineExceededError

BASE = vars(EngineObserver)


def everything(tell) -> type[EngineObserver]:
    """An observer of every event, which goes to `tell(observer, event, arguments)`."""

    def method(event: str):
        return lambda self, *what: tell(self, event, what)

    return type("Everything", (EngineObserver,), {event: method(event) for event in EVENTS})


class Recorder(everything(lambda self, event, what: self.heard.append((event, what)))):
    def __init__(self) -> None:
        self.heard: list[tuple[str, tuple[Any, ...]]] = []

    def names(self, *left_out: str) -> list[str]:
        return [event for event, _ in self.heard if event not in ("worker_state_changed", *left_out)]

    def only(self, event: str) -> tuple[Any, ...]:
        (what,) = [what for name, what in self.heard if name == event]
        return what


class Broken(everything(lambda self, event, what: 1 / 0)):
    pass


@pytest.fixture
async def watched(make_fleet):
    async def make(*args, **kwargs):
        fleet, recorder = await make_fleet(*args, **kwargs), Recorder()
        fleet.engine.observe(recorder)
        return fleet, recorder

    return make


async def test_a_requests_events_come_once_and_in_order(watched, expected):
    fleet, recorder = await watched()
    assert await fleet.run(prompt(20), 8) == expected(prompt(20), 8)
    await fleet.until_idle()
    names = recorder.names("tokens_received", "decode_reported", "handoff_reported", "prefill_reported")
    assert names == ["request_arrived", "router_decided", "request_placed", "first_token", "request_finished"]
    order = recorder.names()
    assert order.index("first_token") + 1 == order.index("tokens_received")
    received = [each[1:] for event, what in recorder.heard if event == "tokens_received" for each in what[0]]
    assert sum(count for count, _ in received) == 8
    assert [seconds is None for _, seconds in received] == [True] + [False] * (len(received) - 1)
    attempts = {what[0].attempt_id for event, what in recorder.heard if event.endswith(("_reported", "_token"))}
    request, attempt = recorder.only("request_finished")
    assert attempts == {attempt.attempt_id}
    assert attempt.request_id == request.request_id
    assert recorder.only("handoff_reported")[1].num_bytes > 0
    assert recorder.only("prefill_reported")[1].num_chunks == 1


async def test_who_waits_is_queued_and_placed_later(watched):
    fleet, recorder = await watched(max_num_seqs=1)
    one = fleet.start(prompt(20), 60)
    await anext(one)
    two = asyncio.create_task(fleet.run(prompt(20, seed=1), 2))
    await fleet.until(lambda _: "request_queued" in recorder.names())
    (queued,) = recorder.only("request_queued")
    assert [what[0] for event, what in recorder.heard if event == "request_placed"] != [queued]
    _ = [token async for token in tokens_of(one)]
    await two
    assert [what[0] for event, what in recorder.heard if event == "request_placed"][-1] is queued


async def test_an_attempt_that_fails_is_told_and_where_the_request_goes_on(watched, expected, caplog):
    fleet, recorder = await watched(2, 1)
    fleet.crash_one_on_submit("prefill-0", "prefill-1")
    with caplog.at_level(logging.INFO):
        assert await fleet.run(prompt(20), 6) == expected(prompt(20), 6)
    failed, error = next(what for event, what in recorder.heard if event == "attempt_failed")
    assert isinstance(error, WorkerLostError)
    order = recorder.names()
    assert order.index("attempt_failed") + 1 == order.index("request_migrated")
    request, attempt = recorder.only("request_finished")
    assert attempt.attempt_id != failed.attempt_id
    line = next(record.getMessage() for record in caplog.records if "goes on elsewhere" in record.getMessage())
    assert f"request {request.request_id} (attempt {failed.attempt_id})" in line


@pytest.mark.usefixtures("like_workers")
async def test_a_request_whose_worker_leaves_migrates_without_having_failed(watched, expected):
    fleet, recorder = await watched(1, 2, max_num_seqs=2, limits={"decode": PoolLimits(drain_timeout_s=0.0)})
    streams = [fleet.start(prompt(20, seed=i), 300) for i in range(2)]
    tokens = [[token.token_id for token in (await anext(stream)).tokens] for stream in streams]
    assert {what[1].decode.partition(".")[0] for event, what in recorder.heard if event == "request_placed"} == {
        "decode-0",
        "decode-1",
    }
    fleet.engine.scale({"decode": 1})
    for stream, so_far in zip(streams, tokens, strict=True):
        so_far += [token async for token in tokens_of(stream)]
    assert tokens == [expected(prompt(20, seed=i), 300) for i in range(2)]
    assert isinstance(recorder.only("request_migrated")[1], WorkerLeavesError)
    assert "attempt_failed" not in recorder.names()


async def test_how_a_request_ends_is_told_once(watched):
    fleet, recorder = await watched()
    with pytest.raises(CapacityError):
        await fleet.run([5] * 600, 4)
    _, attempt, error = recorder.only("request_failed")
    assert (attempt, type(error)) == (None, CapacityError)
    stream = fleet.start(prompt(20), 400)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    _, attempt = recorder.only("request_cancelled")
    assert attempt.first_token_at > 0
    late = fleet.start(prompt(20), 400, timeout_s=0.0)
    with pytest.raises(DeadlineExceededError):
        await anext(late)
    ends = Counter(event for event in recorder.names() if event in ("request_failed", "request_cancelled"))
    assert ends == {"request_failed": 2, "request_cancelled": 1}
    assert "request_finished" not in recorder.names()


async def test_a_workers_states_are_told(watched):
    fleet, recorder = await watched(1, 2)
    (gone,) = [worker.engine_id for worker in fleet.engine.workers() if worker.role == "prefill"]
    fleet.handle("prefill-0").crash("killed by the test")
    await fleet.until(lambda workers: all(w.state == "ready" and w.engine_id != gone for w in workers))
    fleet.engine.scale({"decode": 1})
    await fleet.until(lambda workers: len(workers) == 2)
    changes = [what for event, what in recorder.heard if event == "worker_state_changed"]
    assert [(name.partition(".")[0], state) for name, role, state in changes if role == "prefill"] == [
        ("prefill-0", "lost"),
        ("prefill-0", "starting"),
        ("prefill-0", "ready"),
    ]
    assert [state for _, role, state in changes if role == "decode"] == ["draining", "lost"]


async def test_an_observer_that_raises_hurts_neither_requests_nor_other_observers(make_fleet, expected, caplog):
    fleet, recorder = await make_fleet(), Recorder()
    fleet.engine.observe(Broken())
    fleet.engine.observe(recorder)
    assert await fleet.run(prompt(20), 12) == expected(prompt(20), 12)
    await fleet.until_idle()
    assert recorder.names()[-1] == "request_finished" or "handoff_reported" in recorder.names()
    received = [each for event, what in recorder.heard if event == "tokens_received" for each in what[0]]
    assert sum(count for _, count, _ in received) == 12
    assert "the observer" in caplog.text


def test_one_that_always_fails_does_not_fill_the_log(caplog):
    observers = Observers([Broken()])
    for _ in range(1000):
        observers.request_arrived(None)
    assert len(caplog.records) == 10  # 1, 2, 4, … 512


def test_what_nobody_has_defined_is_an_empty_call():
    class Sparse(EngineObserver):
        def first_token(self, attempt) -> None:
            heard.append(attempt)

    heard: list = []
    observers = Observers([Sparse()])
    observers.first_token("a")
    assert heard == ["a"]
    assert "first_token" in vars(observers)
    assert not set(vars(observers)) & set(EVENTS) - {"first_token"}
    assert {"request_arrived", "request_failed", "worker_state_changed"} <= set(EVENTS) <= set(BASE)


def test_one_that_is_removed_is_told_nothing_more() -> None:
    class Counting(EngineObserver):
        heard = 0

        def request_arrived(self, request) -> None:
            self.heard += 1

    one, other = Counting(), Counting()
    observers = Observers([one, other])
    observers.request_arrived(None)
    observers.remove(one)
    observers.request_arrived(None)
    observers.remove(other)
    observers.request_arrived(None)
    assert (one.heard, other.heard) == (1, 2)
    with pytest.raises(ValueError, match="not in list"):
        observers.remove(one)
