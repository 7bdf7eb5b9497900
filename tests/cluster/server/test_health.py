"""What health checks are told, from the start to the stop, by a real server in front of real workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.gateway.readiness import Readiness
from cluster.server.grpc.serve import Server
from cluster.wire.health_reason import reason_in
from kv_transfer.transports.local import Faults

PATIENCE_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
CONFIG = load_config(environ={}, overrides={"server.port": 0}).server


class Probe:
    """Asks one server for its health."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)

    async def __call__(self, service: str = "") -> tuple[bool, str]:
        call = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(service=service))
        return (await call).status == SERVING, reason_in(await call.trailing_metadata())

    async def until(self, ready: bool, service: str = "", reason: str = "") -> str:
        """The reason that comes with this answer, soon."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self(service)
                if found[0] is ready and reason in found[1]:
                    return found[1]
                await asyncio.sleep(0.01)


@pytest.fixture
async def watch(byte_tokenizer) -> AsyncIterator[Callable]:
    """A server whose health follows an engine, with a canary so often."""
    running, tasks, probes = [], [], []

    async def start(engine, interval_s: float = 0.02, timeout_s: float = 20.0) -> tuple[Server, Probe, Readiness]:
        server = Server(CONFIG)
        await server.open()
        readiness = Readiness(engine, interval_s, timeout_s)
        generation, info = SimpleNamespace(), SimpleNamespace()
        await server.serve(generation, engine, info, readiness.health)

        async def follow() -> None:
            async for found in readiness.follow():
                await server.report(found)

        tasks.extend(asyncio.create_task(each) for each in (readiness.run(), follow()))
        running.append(server)
        probes.append(Probe(server.address))
        return server, probes[-1], readiness

    yield start
    for task in tasks:
        task.cancel()
    for probe, server in zip(probes, running, strict=True):
        await probe.channel.close()
        await server.stop(grace_s=0)


async def test_a_server_that_starts_is_alive_and_says_what_it_is_at() -> None:
    server = Server(CONFIG)
    await server.open()
    probe = Probe(server.address)
    try:
        await server.starting("loading a model")
        assert await probe("liveness") == (True, "")
        assert await probe("readiness") == await probe() == (False, "the service is starting: loading a model")
        async with AsyncBatonClient(Connection(server.address)) as client:
            with pytest.raises(BatonClientError, match="the service is starting: loading a model") as refusal:
                await client.workers()
        assert refusal.value.status is grpc.StatusCode.UNAVAILABLE
    finally:
        await probe.channel.close()
        await server.stop(grace_s=0)


async def test_ready_when_a_canary_has_passed_and_not_when_one_fails(make_fleet, watch) -> None:
    fleet = await make_fleet()
    _, probe, readiness = await watch(fleet.engine)
    assert not readiness.health.ready, "nothing has passed yet"
    await probe.until(True)
    assert {await probe(name) for name in ("baton.v1.Baton", "liveness", "prefill", "decode")} == {(True, "")}
    handle = fleet.handle("decode-0")
    handle.submit, submit = lambda request: None, handle.submit  # it takes requests, and nothing comes of them
    readiness.timeout_s = 0.2
    assert "a canary request failed: the deadline" in await probe.until(False)
    assert await probe("liveness") == (True, "")
    handle.submit = submit
    readiness.timeout_s = 20.0
    await probe.until(True)


async def test_handoffs_that_do_not_arrive_are_found_without_any_client(make_fleet, watch) -> None:
    fleet = await make_fleet(handoff_timeout_s=0.05)
    _, probe, _ = await watch(fleet.engine, timeout_s=1.0)
    await probe.until(True)
    fleet.fabric.faults = Faults(drop=1.0)
    assert "a canary request failed" in await probe.until(False)


async def test_dead_pools_are_known_at_once_and_so_is_their_return(make_fleet, watch) -> None:
    fleet = await make_fleet()
    _, probe, readiness = await watch(fleet.engine, interval_s=3600)
    await probe.until(True)
    async with aclosing(readiness.follow()) as changes:
        await anext(changes)
        for name in ("prefill-0", "decode-0"):
            fleet.handle(name).crash("killed by the test")
        async with asyncio.timeout(PATIENCE_S):
            found = await anext(changes)
    assert not found.ready
    assert "none of 1 workers is ready (lost)" in found.reason
    await probe.until(True)


async def test_a_pool_that_cannot_come_back_is_not_ready_for_good(make_fleet, watch) -> None:
    fleet = await make_fleet()
    _, probe, _ = await watch(fleet.engine)
    await probe.until(True)
    for replica in fleet.engine.pools.replicas:
        replica.spawn = lambda: (_ for _ in ()).throw(RuntimeError("no more workers"))
    for name in ("prefill-0", "decode-0"):
        fleet.handle(name).crash("killed by the test")
    reason = await probe.until(False, reason="none of 1 workers is ready")
    assert reason.startswith("prefill: none of 1 workers is ready")
    assert (await probe("decode"))[0] is (await probe("prefill"))[0] is False


async def test_one_group_of_two_is_missed_and_the_service_goes_on(make_fleet, watch) -> None:
    fleet = await make_fleet(decode={"a": [{}], "b": [{}]})
    _, probe, _ = await watch(fleet.engine)
    await probe.until(True)
    handle = fleet.handle("decode-a-0")
    for replica in fleet.engine.pools.pool("decode"):
        if replica.handle is handle:
            replica.spawn = lambda: (_ for _ in ()).throw(RuntimeError("no more workers"))
    handle.crash("killed by the test")
    assert "none of 1 workers" in await probe.until(False, "decode.a")
    assert await probe("decode.b") == (True, "")
    assert "decode.a: none of 1 workers" in await probe.until(True, reason="decode.a")


async def test_requests_that_pass_take_the_canarys_place(make_fleet, watch) -> None:
    fleet = await make_fleet()
    sent: list[str] = []
    submit = fleet.handle("prefill-0").submit
    fleet.handle("prefill-0").submit = lambda request: (sent.append(request.request_id), submit(request))
    _, probe, readiness = await watch(fleet.engine, interval_s=3600)
    await probe.until(True)
    await fleet.run([5, 6, 7], 3)
    readiness.look()
    await fleet.run([5, 6, 7], 3)
    first = [name.startswith("canary-") for name in sent[:3]]
    assert first == [True, False, False], "a later one may follow what a busy machine does to the workers"


async def test_draining_is_not_ready_and_alive_and_stopped_is_neither(make_fleet, watch) -> None:
    fleet = await make_fleet()
    server, probe, _ = await watch(fleet.engine)
    await probe.until(True)
    await server.drain(0)
    assert await probe() == await probe("readiness") == (False, "the service is shutting down")
    assert await probe("liveness") == (True, "")
    await asyncio.sleep(0.1)
    assert not (await probe())[0], "a canary that passes makes it ready no more"
    await server.stop(grace_s=0)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await probe("liveness")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
