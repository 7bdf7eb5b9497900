"""Workers that live and do not get on: stalled, stuck, frozen in a rank, frozen while they start or meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from cluster.pools import burials, patience, start_watch, supervisor
from cluster.pools.patience import Patience, longest_step_s
from cluster.pools.pools import WorkerPools
from cluster.pools.replica import Loss
from cluster.worker_handle import StartProgress
from fake_workers import FakeWorker, until
from kv_transfer.transports.base import EngineInfo
from workers.heartbeat import Heartbeat
from workers.runner.step_times import StepTimes
from workers.worker_host import WorkerInfo

PATIENCE = Patience(silence_s=0.4, step_timeout_s=60.0, start_timeout_s=1000.0, start_silence_s=8.0)


class Living(FakeWorker):
    """A fake worker whose heart beats, until the test has it freeze."""

    freezes_at = ""
    ends = True
    confirmed: list[tuple[str, str, bool]]

    def __init__(self, name: str, log: list[tuple]) -> None:
        super().__init__(name, log)
        self.heartbeat = Heartbeat(0)
        self.frozen = False
        self._beats = asyncio.ensure_future(self._beat())

    async def _beat(self) -> None:
        while not self.frozen:
            self.said.put_nowait([self.heartbeat])
            await asyncio.sleep(0.02)

    async def start(self, progress: Callable) -> WorkerInfo:
        if self.freezes_at == "birth":
            progress(self.name, StartProgress("process", 0, 1))
            await self._freeze()
        for _ in range(3):
            progress(self.name, StartProgress("process", 1, 1))
            await asyncio.sleep(0.01)
        if self.freezes_at == "start":
            await self._freeze()
        while self.freezes_at == "step of the start":
            progress(self.name, StartProgress("weights", 5, 9))
            await asyncio.sleep(0.005)
        return await super().start(progress)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        if self.freezes_at == "meeting":
            await self._freeze()
        return await super().new_endpoint(peer)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        self.confirmed.append((self.engine_id, engine_id, confirmed_dead))

    async def stop(self) -> bool:
        self._beats.cancel()
        await super().stop()
        return self.ends

    async def has_ended(self) -> bool:
        return self.ends

    async def _freeze(self) -> None:
        self.frozen = True
        await asyncio.Event().wait()


class Stage:
    """Two prefill workers and a decode worker, all alive; the next one to be made may be told how to be."""

    def __init__(self, limits: Patience) -> None:
        self.log: list[tuple] = []
        self.losses: list[Loss] = []
        self.confirmed: list[tuple[str, str, bool]] = []
        self.next: dict[str, object] = {}
        self.pools = WorkerPools(
            [partial(self._spawn, "prefill-0"), partial(self._spawn, "prefill-1")],
            [partial(self._spawn, "decode-0")],
            on_output=lambda output: None,
            on_change=lambda loss: None if loss is None else self.losses.append(loss),
            patience=limits,
        )

    def _spawn(self, name: str) -> Living:
        made = Living(name, self.log)
        made.confirmed = self.confirmed
        for key, value in self.next.items():
            setattr(made, key, value)
        self.next = {}
        return made

    def replica(self, name: str):
        return next(replica for replica in self.pools.replicas if replica.handle.name == name)

    def states(self) -> dict[str, str]:
        return {status.engine_id: status.state for status in self.pools.status()}


@pytest.fixture
async def stage(monkeypatch):
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_S", (0.0,))
    monkeypatch.setattr(start_watch, "ROUND_S", 0.02)
    monkeypatch.setattr(patience, "LEAST_START_S", 0.2)
    monkeypatch.setattr(burials, "ASK_AGAIN_S", 0.01)
    made = Stage(replace(PATIENCE, start_silence_s=0.16, start_timeout_s=0.6))
    await made.pools.start()
    yield made
    await made.pools.stop()


async def test_a_step_that_takes_long_keeps_requests_away_until_it_ends(stage):
    worker = stage.replica("prefill-0").handle
    worker.heartbeat = Heartbeat(9, 59.0)
    await until(lambda: stage.states()["prefill-0.0"] == "stalled")
    assert stage.states()["prefill-1.0"] == "ready"
    worker.heartbeat = Heartbeat(10, 0.1)
    await until(lambda: stage.states()["prefill-0.0"] == "ready")
    assert stage.losses == []


async def test_a_step_that_does_not_end_costs_its_worker(stage):
    stage.replica("prefill-0").handle.heartbeat = Heartbeat(9, 60.0)
    await until(lambda: stage.states().get("prefill-0.1") == "ready")
    assert stage.losses == [Loss("prefill-0.0", crashed=True)], "one of its requests may be why"
    assert ("stop", "prefill-0.0") in stage.log


async def test_a_frozen_rank_costs_its_worker_and_is_no_requests_doing(stage):
    stage.replica("decode-0").handle.heartbeat = Heartbeat(9, 0.0, (1,))
    await until(lambda: stage.states().get("decode-0.1") == "ready")
    assert stage.losses == [Loss("decode-0.0", crashed=False)]


@pytest.mark.parametrize("where", ["birth", "start", "step of the start", "meeting"])
async def test_a_worker_that_freezes_before_it_serves_is_replaced(where, stage):
    """And holds nobody else up: another place's worker starts and meets everybody meanwhile."""
    stage.next = {"freezes_at": where}
    stage.replica("prefill-0").handle.heartbeat = Heartbeat(9, 60.0)
    await until(lambda: stage.next == {})
    stage.replica("prefill-1").handle.heartbeat = Heartbeat(9, 60.0)
    await until(lambda: stage.states().get("prefill-1.1") == "ready")
    await until(lambda: stage.states().get("prefill-0.2") == "ready")
    assert ("stop", "prefill-0.1") in stage.log


async def test_an_end_that_nobody_could_confirm_is_asked_for_again(stage):
    decode, frozen = stage.replica("decode-0"), stage.replica("prefill-0").handle
    decode.load = replace(decode.load, quarantined_blocks=3)
    frozen.ends, frozen.frozen = False, True
    await until(lambda: stage.states().get("prefill-0.1") == "ready")
    assert stage.confirmed == [("decode-0.0", "prefill-0.0", False)]
    frozen.ends = True
    await until(lambda: len(stage.confirmed) > 1)
    assert stage.confirmed[1:] == [("decode-0.0", "prefill-0.0", True)]


async def test_what_is_allowed_follows_what_was_measured(stage, monkeypatch):
    monkeypatch.setattr(patience, "LEAST_START_S", 120.0)
    info = stage.replica("prefill-0").info
    slow = replace(info, step_times=StepTimes(prefill=((2048, 30.0),), decode=((4, 2.0),)))
    assert longest_step_s(slow) == pytest.approx(32.0)
    assert (PATIENCE.stalled_after_s(info), PATIENCE.stuck_after_s(info)) == (3.0, 60.0)
    assert (PATIENCE.stalled_after_s(slow), PATIENCE.stuck_after_s(slow)) == (128.0, 320.0)
    assert replace(PATIENCE, step_timeout_s=1.0).stalled_after_s(info) == 1.0, "never later than it is given up"
    assert [PATIENCE.start_s(None, 5), PATIENCE.start_s(2.0, 0), PATIENCE.start_s(90.0, 0)] == [1000.0, 120.0, 900.0]
    assert [PATIENCE.start_s(90.0, failed) for failed in (1, 2)] == [1800.0, 3600.0], "the prediction may be wrong"
