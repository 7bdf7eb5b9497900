"""The actor's own part, without Ray: one stream of outputs, and calls that may overtake each other."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray.actors import WorkerActor
from cluster.worker_handle import StartProgress
from made_requests import worker_request
from workers.config import WorkerConfig
from workers.messages import Load, StepOutput, WorkerRequest

ROOT = Path(__file__).parents[2]


class RecordingHost:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def submit(self, request: WorkerRequest) -> None:
        self.calls.append(("submit", request.attempt_id))

    def abort(self, request_id: str) -> None:
        self.calls.append(("abort", request_id))


@pytest.fixture
async def actor() -> WorkerActor:
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
    actor._host = RecordingHost()
    return actor


def request(request_id: str) -> WorkerRequest:
    return worker_request(request_id, (5,))


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


async def test_how_far_a_start_is_is_told_by_stage(actor):
    assert await actor.progress() == []
    for progress in (
        StartProgress("weights", 1, 9),
        StartProgress("weights", 9, 9),
        StartProgress("graphs", 2, 36),
    ):
        actor._on_progress(progress)
    assert await actor.progress() == [StartProgress("weights", 9, 9), StartProgress("graphs", 2, 36)]


async def test_a_lead_that_never_started_leaves_nothing_behind():
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere", tensor_parallel_size=2))
    seats = await actor.seats()
    assert [(seat.rank, seat.size) for seat in seats] == [(0, 2), (1, 2)]
    assert await actor.seats() == seats
    folder = Path(seats[0].socket).parent
    assert await asyncio.to_thread(folder.exists)
    await actor.stop()
    assert not await asyncio.to_thread(folder.exists)


async def test_a_worker_with_other_ranks_does_not_start_without_seats():
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere", tensor_parallel_size=2))
    with pytest.raises(ValueError, match="seats for 1 ranks, it has 2"):
        await actor.start()


def test_a_follower_without_its_lead_ends_its_process():
    program = """
from cluster.ray.actors import FollowerActor
from workers.config import WorkerConfig
actor = FollowerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
actor._on_end(None)
print("in good order it stays", flush=True)
actor._on_end(EOFError("the lead is gone"))
print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == "in good order it stays\n"
    assert "a rank of prefill-0 ends: the lead is gone" in done.stderr


async def test_what_is_heard_renews_the_right_to_write(actor, monkeypatch):
    monkeypatch.setattr("cluster.ray.actors.HEARTBEAT_S", 0.01)
    assert await actor.renew(0) is None, "nothing has been said yet"
    stream = actor.outputs()
    await anext(stream)
    first = await actor.renew(1)
    assert first is not None
    for _ in range(100):
        await anext(stream)
    last = await actor.renew(101)
    assert last is not None
    assert last > first
    assert actor._lease.holds()


def test_a_worker_that_nobody_hears_ends_its_process():
    program = """
import asyncio
from cluster.ray.actors import WorkerActor
from kv_transfer.lease import Lease
from workers.config import WorkerConfig

async def run():
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
    actor._lease = Lease(1.5)
    heard = 0
    async for _ in actor.outputs():
        heard += 1
        print(heard, flush=True)
        if heard < 3:
            await actor.renew(heard)

asyncio.run(run())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout.startswith("1\n2\n3\n")
    assert "prefill-0 ends: nobody has heard of it for long" in done.stderr


async def test_a_worker_with_nothing_to_say_says_that(actor, monkeypatch):
    monkeypatch.setattr("cluster.ray.actors.HEARTBEAT_S", 0.01)
    stream = actor.outputs()
    assert [await anext(stream) for _ in range(3)] == [[], [], []]
    await asyncio.to_thread(actor._emit, output(1))
    assert [output(1)] in [await anext(stream) for _ in range(3)]
