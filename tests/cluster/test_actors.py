"""The actor's own part, without Ray: one stream of outputs, and calls that may overtake each other."""

from __future__ import annotations

import asyncio

import pytest

from cluster.actors import WorkerActor
from workers.config import WorkerConfig
from workers.messages import Load, PrefillRequest, StepOutput
from workers.sampling.params import SamplingParams


class RecordingHost:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def submit(self, request: PrefillRequest) -> None:
        self.calls.append(("submit", request.request_id))

    def abort(self, request_id: str) -> None:
        self.calls.append(("abort", request_id))


@pytest.fixture
async def actor() -> WorkerActor:
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
    actor._host = RecordingHost()
    return actor


def request(request_id: str) -> PrefillRequest:
    return PrefillRequest(request_id, b"h" * 16, (5,), SamplingParams(seed=0), None, 1.0)


def output(free: int) -> StepOutput:
    return StepOutput("prefill-0.1", (), Load(8, free))


async def test_a_request_whose_abort_came_first_is_not_started(actor):
    await actor.abort("a")
    await actor.submit(request("a"))
    await actor.submit(request("b"))
    await actor.abort("b")
    assert actor._host.calls == [("abort", "a"), ("submit", "b"), ("abort", "b")]


async def test_aborts_are_not_remembered_for_ever(actor):
    for number in range(10_000):
        await actor.abort(str(number))
    assert len(actor._aborted) < 5_000
    await actor.submit(request("9999"))
    assert ("submit", "9999") not in actor._host.calls


async def test_outputs_gather_while_nobody_asks(actor):
    stream = actor.outputs()
    for free in (1, 2, 3):
        await asyncio.to_thread(actor._emit, output(free))
    assert await anext(stream) == [output(1), output(2), output(3)]
    await asyncio.to_thread(actor._emit, output(4))
    assert await anext(stream) == [output(4)]


async def test_a_crash_ends_the_stream_after_what_was_said_before(actor):
    await asyncio.to_thread(actor._emit, output(1))
    await asyncio.to_thread(actor._on_crash, ValueError("out of memory"))
    stream = actor.outputs()
    assert await anext(stream) == [output(1)]
    with pytest.raises(RuntimeError, match="prefill-0 crashed: ValueError: out of memory"):
        await anext(stream)


async def test_nothing_can_be_asked_before_the_start():
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
    with pytest.raises(RuntimeError, match="prefill-0 has not started"):
        await actor.submit(request("a"))
