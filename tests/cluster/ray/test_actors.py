"""The actor's own part, without Ray: one stream of outputs, and calls that may overtake each other."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray.actors import WorkerActor
from cluster.worker_handle import StartProgress
from kv_transfer.lease import Lease
from made_requests import worker_request
from workers.config import WorkerConfig
from workers.heartbeat import Heartbeat
from workers.messages import Load, StepOutput, WorkerRequest

ROOT = Path(__file__).parents[3]


class RecordingHost:
    """Writes down what it is told, and says what the test wants."""

    info = None

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def build(self, config, connector, emit, on_crash, progress, capture_progress, channel) -> RecordingHost:
        self.emit, self.on_crash = emit, on_crash
        self.progress, self.capture_progress = progress, capture_progress
        return self

    def submit(self, request: WorkerRequest) -> None:
        self.calls.append(("submit", request.attempt_id))

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.calls.append(("abort", request_id))

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(7, 1.5)


@pytest.fixture
def host() -> RecordingHost:
    return RecordingHost()


@pytest.fixture
async def actor(host) -> WorkerActor:
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"), host.build)
    await actor.start()
    return actor


def request(request_id: str) -> WorkerRequest:
    return worker_request(request_id, (5,))


def output(free: int) -> StepOutput:
    return StepOutput("prefill-0.1", (), Load(8, free))


async def test_a_request_whose_abort_came_first_is_not_started(actor, host):
    await actor.abort("a")
    await actor.submit(request("a"))
    await actor.submit(request("b"))
    await actor.abort("b")
    assert host.calls == [("abort", "a"), ("submit", "b"), ("abort", "b")]


async def test_aborts_are_not_remembered_for_ever(actor, host):
    for number in range(10_000):
        await actor.abort(str(number))
    await actor.submit(request("5000"))
    assert ("submit", "5000") in host.calls
    await actor.submit(request("9999"))
    assert ("submit", "9999") not in host.calls


async def test_outputs_gather_while_nobody_asks(actor, host):
    stream = actor.outputs()
    for free in (1, 2, 3):
        await asyncio.to_thread(host.emit, output(free))
    assert await anext(stream) == [output(1), output(2), output(3)]
    await asyncio.to_thread(host.emit, output(4))
    assert await anext(stream) == [output(4)]


async def test_a_crash_ends_the_stream_after_what_was_said_before(actor, host):
    await asyncio.to_thread(host.emit, output(1))
    await asyncio.to_thread(host.on_crash, ValueError("out of memory"))
    stream = actor.outputs()
    assert await anext(stream) == [output(1)]
    with pytest.raises(RuntimeError, match="prefill-0 crashed: ValueError: out of memory"):
        await anext(stream)


async def test_nothing_can_be_asked_before_the_start():
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"))
    with pytest.raises(RuntimeError, match="prefill-0 has not started"):
        await actor.submit(request("a"))


async def test_how_far_a_start_is_is_told_by_stage(actor, host):
    assert await actor.progress() == []
    host.progress(1, 9)
    host.progress(9, 9)
    host.capture_progress(2, 36)
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
import asyncio
from cluster.ray.actors import FollowerActor
from workers.config import WorkerConfig
from workers.lockstep.channel import Seat

async def end_of_follower():
    ends = []
    actor = FollowerActor(WorkerConfig("prefill-0", "prefill", "nowhere"), lambda *args: ends.append(args[-1]))
    await actor.start(Seat(1, 2, "nowhere", "nowhere", b""))
    return ends[0]

end = asyncio.run(end_of_follower())
end(None)
print("in good order it stays", flush=True)
end(EOFError("the lead is gone"))
print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == "in good order it stays\n"
    assert "a rank of prefill-0 ends: the lead is gone" in done.stderr


async def test_what_is_heard_renews_the_right_to_write():
    now = [100.0]
    lease = Lease(10.0, lambda: now[0])
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"), lease=lease)
    assert await actor.renew(None) > 0
    now[0] = 1000.0
    assert lease.holds(), "nothing has been heard yet: it has not begun"
    await actor.renew(995.0)
    now[0] = 1005.0
    assert not lease.holds()
    await actor.renew(1004.0)
    assert lease.holds()


async def test_a_worker_that_nobody_hears_stays(monkeypatch):
    monkeypatch.setattr("cluster.ray.actors.HEARTBEAT_S", 0.01)
    lease = Lease(0.02)
    actor = WorkerActor(WorkerConfig("prefill-0", "prefill", "nowhere"), lease=lease)
    stream = actor.outputs()
    while lease.holds():
        await anext(stream)
    for _ in range(5):
        assert await anext(stream) == [], "it has not ended its process"


async def test_a_worker_with_nothing_to_say_says_how_it_gets_on(actor, host, monkeypatch):
    monkeypatch.setattr("cluster.ray.actors.HEARTBEAT_S", 0.01)
    stream = actor.outputs()
    assert [await anext(stream) for _ in range(3)] == [[Heartbeat(7, 1.5)]] * 3
    await asyncio.to_thread(host.emit, output(1))
    assert output(1) in [item for _ in range(3) for item in await anext(stream)]
