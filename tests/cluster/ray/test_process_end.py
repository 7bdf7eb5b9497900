"""A worker counts as ended when it said so itself, or its machine says that its process is gone; never on trust."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.ray import process_end, worker
from cluster.ray.lease_keeper import LeaseKeeper
from cluster.ray.placement_group import RankResources
from cluster.ray.process_end import Whereabouts, all_ended, has_ended
from kv_transfer.process import ProcessId
from workers.config import WorkerConfig


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def id_of(process: subprocess.Popen) -> ProcessId:
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[19])
    return replace(ProcessId.own(), pid=process.pid, started=started)


def test_a_process_has_ended_when_it_is_gone_or_a_zombie(child, monkeypatch):
    monkeypatch.setattr(process_end, "DYING_S", 0.1)
    process = id_of(child)
    assert not has_ended(process)
    child.send_signal(signal.SIGSTOP)
    assert not has_ended(process), "a frozen one goes on some day"
    child.kill()
    monkeypatch.setattr(process_end, "DYING_S", 10.0)
    assert has_ended(process)
    assert not has_ended(replace(process, host="another")), "nobody can look there from here"


def test_a_frozen_process_is_ended_and_never_a_later_one_of_its_number(child):
    process = id_of(child)
    child.send_signal(signal.SIGSTOP)
    assert process_end.end(replace(process, started=process.started - 1)), "that one is gone"
    assert child.poll() is None
    assert process_end.end(process)
    assert child.wait(10) == -signal.SIGKILL


class FakeRank:
    """An actor's handle: every call answers what the test says, or never."""

    def __init__(self, stop: Callable[[], Awaitable[None]], *, answers: bool = True) -> None:
        self.stop = SimpleNamespace(remote=lambda: asyncio.ensure_future(stop()))
        place = Whereabouts("node", ProcessId.own())
        self.start = SimpleNamespace(remote=lambda: answer(None))
        self.progress = SimpleNamespace(remote=lambda: answer([]) if answers else asyncio.ensure_future(freezes()))
        self.whereabouts = SimpleNamespace(remote=lambda: answer(place))


def answer(value: object) -> asyncio.Future:
    async def say() -> object:
        return value

    return asyncio.ensure_future(say())


async def says_so() -> None:
    """It has stopped."""


async def freezes() -> None:
    await asyncio.sleep(3600)


async def dies() -> None:
    raise worker.RayActorError


@pytest.fixture
def placed(monkeypatch) -> Callable[[FakeRank], worker.RayWorker]:
    """A worker whose only rank is this one."""

    def make(rank: FakeRank) -> worker.RayWorker:
        class Placement:
            def __init__(self, *args: object) -> None:
                pass

            def create(self, *args: object) -> FakeRank:
                return rank

            async def wait(self) -> None:
                pass

            def remove(self) -> None:
                pass

        monkeypatch.setattr(worker, "RankPlacement", Placement)
        monkeypatch.setattr(worker.ray, "kill", lambda rank: None)
        monkeypatch.setattr(worker.ray, "available_resources", dict)
        return worker.RayWorker(
            WorkerConfig("prefill-0", "prefill", "nowhere"), RankResources(num_cpus=1, num_gpus=0), LeaseKeeper()
        )

    return make


@pytest.fixture
async def started(monkeypatch, placed):
    """A worker that has started, whose rank answers `stop` as the test says, and whose machine answers likewise."""

    async def make(stop: Callable[[], Awaitable[None]], machine: bool | None):
        async def look(rank: Whereabouts) -> bool:
            if machine is None:
                await asyncio.sleep(3600)
            return bool(machine)

        monkeypatch.setattr(worker, "STOP_TIMEOUT_S", 0.05)
        monkeypatch.setattr(worker, "all_ended", lambda ranks: all_ended(ranks, 0.05, look))
        made = placed(FakeRank(stop))
        await made.start(lambda name, progress: None)
        return made

    return make


async def test_a_process_that_does_not_answer_is_told_from_one_that_is_not_there(monkeypatch, placed):
    """Room may be waited for as long as it takes; a process may not."""
    monkeypatch.setattr(worker, "LOOK_INTERVAL_S", 0.01)
    there, told = [False], []
    monkeypatch.setattr(worker, "have_processes", lambda ranks: there[0])
    made = placed(FakeRank(says_so, answers=False))
    start = asyncio.ensure_future(made.start(lambda name, progress: told.append((progress.stage, progress.done))))
    await asyncio.sleep(0.1)
    assert told == []
    there[0] = True
    for _ in range(1000):
        await asyncio.sleep(0.005)
        if told:
            break
    assert told == [("process", 0)]
    start.cancel()
    await asyncio.wait({start})


@pytest.mark.parametrize(
    ("stop", "machine", "confirmed"),
    [
        (says_so, None, True),  # its own word is enough, whatever its machine says
        (freezes, None, False),  # its node froze while it stopped
        (freezes, False, False),
        (freezes, True, True),  # it was killed for certain
        (dies, None, False),
        (dies, True, True),
    ],
)
async def test_what_stopping_says(stop, machine, confirmed, started):
    assert await (await started(stop, machine)).stop() is confirmed
