"""The pools: everybody meets, what does not fit is remembered, who is lost is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.errors import WorkerLostError
from cluster.pools import handshake, supervisor
from cluster.pools.pools import WorkerPools
from cluster.pools.router_view import links_of
from fake_workers import PATIENCE_S, FakeWorker, until
from kv_transfer.link_cost import LinkCost
from workers.errors import CheckpointError, ConfigError
from workers.messages import Load, StepOutput


class Stage:
    """Pools of fake workers; `settings[name]` are the arguments of successive workers of that name."""

    def __init__(self, prefill: int = 1, decode: int = 1, settings: dict[str, list[dict]] | None = None) -> None:
        self.log: list[tuple] = []
        self.outputs: list[StepOutput] = []
        self.on_output: Callable[[StepOutput], object] = self.outputs.append
        self.changes: list[str | None] = []
        self._settings = settings or {}
        self.pools = WorkerPools(
            [self._spawn(f"prefill-{i}") for i in range(prefill)],
            [self._spawn(f"decode-{i}") for i in range(decode)],
            on_output=lambda output: self.on_output(output),
            on_change=lambda loss: self.changes.append(loss.engine_id if loss is not None else None),
        )

    def _spawn(self, name: str) -> Callable[[], FakeWorker]:
        def spawn() -> FakeWorker:
            queue = self._settings.get(name, [])
            return FakeWorker(name, self.log, **(queue.pop(0) if queue else {}))

        return spawn

    def replica(self, name: str):
        return next(replica for replica in self.pools.replicas if replica.handle.name == name)

    def states(self) -> dict[str, str]:
        return {status.engine_id: status.state for status in self.pools.status()}


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch):
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_S", (0.0,))


async def test_everybody_of_one_pool_meets_everybody_of_the_other():
    stage = Stage(2, 3)
    await stage.pools.start()
    handshakes = {entry[1:] for entry in stage.log if entry[0] == "connect"}
    prefill, decode = [f"prefill-{i}.0" for i in range(2)], [f"decode-{i}.0" for i in range(3)]
    assert handshakes == {(p, d) for p in prefill for d in decode} | {(d, p) for p in prefill for d in decode}
    assert set(stage.states().values()) == {"ready"}
    assert [m.handle.role for m in stage.pools.pool("decode")] == ["decode"] * 3
    assert stage.pools.find("decode-1.0") is stage.replica("decode-1")
    assert stage.pools.find("decode-9.0") is None
    await stage.pools.stop()
    assert {entry[1] for entry in stage.log if entry[0] == "stop"} == {*prefill, *decode}


async def test_the_router_is_told_what_the_ways_cost():
    stage = Stage(2, 2)
    await stage.pools.start()
    links = links_of(stage.pools.pool("prefill"))
    everybody = ("decode-0.0", "decode-1.0")
    link = LinkCost(0.002 + 0.001 / 2, 0.0, 1e9)
    assert links == {f"prefill-{i}.0": dict.fromkeys(everybody, link) for i in range(2)}
    assert {entry[1] for entry in stage.log if entry[0] == "path"} == set(links), "prefill workers have measured them"
    stage.replica("decode-1").handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: stage.states().get("decode-1.1") == "ready")
    assert set(links_of(stage.pools.pool("prefill"))["prefill-0.0"]) == {"decode-0.0", "decode-1.1"}
    await stage.pools.stop()


async def test_what_a_worker_says_is_passed_on_and_its_load_remembered():
    stage = Stage()
    await stage.pools.start()
    output = StepOutput("decode-0.0", (), Load(8, 3, running=2))
    stage.replica("decode-0").handle.said.put_nowait([output])
    await until(lambda: stage.outputs == [output])
    assert stage.pools.status()[1].load == output.load
    await stage.pools.stop()


async def test_no_pair_that_fits_stops_the_start():
    stage = Stage(2, 1, {"decode-0": [{"block_size": 32}]})
    with pytest.raises(ConfigError, match="no prefill worker can hand over to any decode worker: block_size is"):
        await stage.pools.start()
    await stage.pools.stop()


async def test_a_pair_that_does_not_fit_is_remembered_with_its_reason():
    stage = Stage(2, 1, {"prefill-1": [{"block_size": 32}]})
    await stage.pools.start()
    unsupported_reasons = {
        **stage.replica("prefill-1").unsupported_reasons,
        **stage.replica("decode-0").unsupported_reasons,
    }
    assert len(unsupported_reasons) == 1
    assert "block_size is" in next(iter(unsupported_reasons.values()))
    assert stage.replica("prefill-0").unsupported_reasons == {}
    await stage.pools.stop()


async def test_a_worker_that_cannot_start_stops_the_start():
    stage = Stage(1, 2, {"decode-1": [{"error": CheckpointError("model.safetensors is truncated")}]})
    with pytest.raises(CheckpointError, match="truncated"):
        await stage.pools.start()
    await stage.pools.stop()
    assert len([entry for entry in stage.log if entry[0] == "stop"]) == 3


async def test_a_lost_worker_is_replaced_and_meets_its_peers_again():
    stage = Stage(1, 2)
    await stage.pools.start()
    stage.replica("prefill-0").handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: stage.states().get("prefill-0.1") == "ready")
    assert "prefill-0.0" in stage.changes
    told = [entry for entry in stage.log if entry[0] == "disconnect"]
    assert told == [("disconnect", "decode-0.0", "prefill-0.0"), ("disconnect", "decode-1.0", "prefill-0.0")]
    assert stage.log.index(("stop", "prefill-0.0")) < stage.log.index(told[0]), "it can write nothing when peers hear"
    assert ("connect", "prefill-0.1", "decode-1.0") in stage.log
    assert ("connect", "decode-1.0", "prefill-0.1") in stage.log
    assert stage.replica("prefill-0").restarts == 1
    await stage.pools.stop()


@pytest.mark.parametrize("error", [ConfigError("no memory"), OSError("no file"), RuntimeError("a bug")])
async def test_a_replacement_that_fails_is_tried_again_whatever_the_error(error):
    stage = Stage(1, 1, {"decode-0": [{}, {"error": error}, {"error": error}, {}]})
    await stage.pools.start()
    stage.replica("decode-0").handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: stage.states().get("decode-0.3") == "ready")
    assert ("stop", "decode-0.1") in stage.log
    assert ("stop", "decode-0.2") in stage.log
    await stage.pools.stop()


async def test_a_loss_why_it_lasts_and_the_return_are_said_once_each(caplog: pytest.LogCaptureFixture):
    full, gone = {"error": ConfigError("no memory")}, {"error": OSError("no file")}
    stage = Stage(1, 1, {"decode-0": [{}, full, full, full, gone, gone, {}]})
    await stage.pools.start()
    stage.replica("decode-0").handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: stage.states().get("decode-0.6") == "ready")
    await until(lambda: "is back" in caplog.text)
    first, second, third, fourth = (record.getMessage() for record in caplog.records)
    assert first == "lost decode-0.0: killed"
    assert second == "could not start decode-0: ConfigError: no memory; it is tried again and again"
    assert third == "could not start decode-0: OSError: no file; it is tried again and again"
    assert fourth.startswith("decode-0 is back, ")
    assert fourth.endswith(": decode-0.6")
    await stage.pools.stop()


async def test_an_error_in_taking_output_costs_one_worker_not_the_service():
    stage = Stage()
    await stage.pools.start()
    stage.on_output = lambda output: 1 // 0
    stage.replica("decode-0").handle.said.put_nowait([StepOutput("decode-0.0", (), Load(8, 8))])
    await until(lambda: stage.states().get("decode-0.1") == "ready")
    await stage.pools.stop()


async def test_two_that_cannot_reach_each_other_are_no_pair_until_they_can(monkeypatch):
    monkeypatch.setattr(handshake, "RECONCILE_INTERVAL_S", 0.0)
    deaf = {"prefill-0": [{"unreachable": "decode-1.0"}], "decode-1": [{"unreachable": "prefill-0.0"}]}
    stage = Stage(1, 2, deaf)
    await stage.pools.start()
    unreachable_peers = [reason for replica in stage.pools.replicas for reason in replica.unreachable_peers.values()]
    assert len(unreachable_peers) == 1
    assert "did not answer" in unreachable_peers[0]
    assert stage.replica("decode-0").unreachable_peers == {}
    assert all(replica.unsupported_reasons == {} for replica in stage.pools.replicas), (
        "it may pass, so it is no refusal"
    )
    for replica in stage.pools.replicas:
        replica.handle.unreachable = None
    await until(lambda: all(replica.unreachable_peers == {} for replica in stage.pools.replicas))
    assert stage.replica("decode-1").handle.endpoints >= 2, "each attempt has an endpoint of its own"
    await stage.pools.stop()


async def test_a_start_waits_for_those_that_cannot_reach_each_other_yet(monkeypatch):
    monkeypatch.setattr(handshake, "RECONCILE_INTERVAL_S", 0.0)
    deaf = {"prefill-0": [{"unreachable": "decode-0.0"}], "decode-0": [{"unreachable": "prefill-0.0"}]}
    stage = Stage(1, 1, deaf)
    start = asyncio.ensure_future(stage.pools.start())
    await until(lambda: any(replica.unreachable_peers for replica in stage.pools.replicas))
    await asyncio.sleep(0)
    assert not start.done()
    for replica in stage.pools.replicas:
        replica.handle.unreachable = None
    await asyncio.wait_for(start, PATIENCE_S)
    assert set(stage.states().values()) == {"ready"}
    await stage.pools.stop()


async def test_who_is_slow_to_meet_does_not_keep_others_from_starting(monkeypatch):
    monkeypatch.setattr(handshake, "MEETING_PATIENCE_S", 0.0)
    monkeypatch.setattr(handshake, "RECONCILE_INTERVAL_S", 0.01)
    stage = Stage(1, 2)
    await stage.pools.start()
    prefill = stage.replica("prefill-0")
    assert {replica.state for replica in stage.pools.replicas} == {"ready"}
    await until(lambda: not any(replica.unreachable_peers for replica in stage.pools.replicas))
    assert set(prefill.links) == {"decode-0.0", "decode-1.0"}, "they have met by and by"
    await stage.pools.stop()


async def test_a_start_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(handshake, "START_PATIENCE_S", 0.01)
    deaf = {"prefill-0": [{"unreachable": "decode-0.0"}], "decode-0": [{"unreachable": "prefill-0.0"}]}
    stage = Stage(1, 1, deaf)
    with pytest.raises(ConfigError, match=r"hand over to any decode worker: .* did not answer"):
        await stage.pools.start()
    await stage.pools.stop()


async def test_a_place_that_fails_again_and_again_has_no_future():
    stage = Stage(1, 1, {"decode-0": [{}, *[{"error": CheckpointError("no checkpoint")}] * 5000]})
    await stage.pools.start()
    replica = stage.replica("decode-0")
    assert replica.may_return
    replica.handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: not replica.may_return)
    assert stage.replica("prefill-0").may_return
    await stage.pools.stop()


async def test_stopping_in_the_middle_of_a_replacement(monkeypatch):
    monkeypatch.setattr(supervisor, "RESTART_DELAYS_S", (1000.0,))
    stage = Stage()
    await stage.pools.start()
    stage.replica("decode-0").handle.said.put_nowait(WorkerLostError("killed"))
    await until(lambda: "decode-0.0" in stage.changes)
    await asyncio.wait_for(stage.pools.stop(), PATIENCE_S)
    assert ("stop", "prefill-0.0") in stage.log
