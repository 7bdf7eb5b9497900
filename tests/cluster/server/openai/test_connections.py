"""Connections, watches and streams that are only held: bounded in number and in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.errors import QueueFullError
from cluster.server import http_protocol, unread
from cluster.server.connections import connections_of, raise_file_limit
from cluster.server.grpc.health import watches_of
from cluster.server.host_connections import HostConnections, fair_level
from cluster.server.host_counts import HostCounts
from cluster.server.openai import bounded_route
from cluster.server.unread import UnreadStreams
from protos import baton_pb2, baton_pb2_grpc

PATIENCE_S = 30.0


def test_no_host_has_all() -> None:
    counts = HostCounts(3, 2)
    assert [counts.take("a"), counts.take("a"), counts.take("a")] == [True, True, False]
    assert [counts.take("b"), counts.take("b"), counts.take("c")] == [True, False, False]
    counts.give_back("a")
    assert counts.take("c")
    assert len(counts) == 3
    most, most_of_one = connections_of(raise_file_limit())
    assert 2 * most < raise_file_limit()
    assert most_of_one <= most // 2


async def test_watches_leave_room_for_calls(serve: Callable, answer: Callable) -> None:
    served = await serve(answer("a"), max_concurrent_rpcs=32)
    allowed = watches_of(32).most_of_one
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        calls = [watch(health_pb2.HealthCheckRequest()) for _ in range(32)]
        answers = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        told = [isinstance(answer, health_pb2.HealthCheckResponse) for answer in answers]
        refused = [call for call, is_told in zip(calls, told, strict=True) if not is_told]
        assert len(refused) == 32 - allowed
        assert {await call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert f"at most {allowed} of one host may" in await refused[0].details()
        async with AsyncBatonClient(served.connection) as client:
            assert (await client.generate_once("x")).text == "a"
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.05)
        again = watch(health_pb2.HealthCheckRequest())
        assert await again.read() is not grpc.aio.EOF, "those that have left make room"
        assert "service has 129 characters" in await watch(health_pb2.HealthCheckRequest(service="x" * 129)).details()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
    return b""


async def test_http_connections_that_ask_nothing_are_closed(serve_http, monkeypatch) -> None:
    monkeypatch.setitem(http_protocol.BoundedProtocol.__init__.__kwdefaults__, "head_limit_s", 0.2)
    monkeypatch.setattr(bounded_route, "BODY_LIMIT_S", 0.2)
    served = await serve_http()
    port = served.server.port
    silent, _ = await asyncio.open_connection("127.0.0.1", port)
    slow, slow_writer = await asyncio.open_connection("127.0.0.1", port)
    slow_writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n")
    late, late_writer = await asyncio.open_connection("127.0.0.1", port)
    late_writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await late.readline()).startswith(b"HTTP/1.1 200")
    await late.readuntil(b"\r\n\r\n")
    late_writer.write(b"GET /hea")  # answered once, and then half a request
    bodiless, bodiless_writer = await asyncio.open_connection("127.0.0.1", port)
    bodiless_writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    assert await until_closed(silent) == await until_closed(slow) == b""
    assert b"HTTP" not in await until_closed(late)
    async with asyncio.timeout(PATIENCE_S):
        assert (await bodiless.readline()).startswith(b"HTTP/1.1 408")
    bodiless_writer.close()


async def asked(port: int, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A connection over which the service was asked whether it lives, and what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        return reader, writer, head + await reader.readexactly(length)


async def test_one_host_has_a_part_of_the_http_connections(serve_http, monkeypatch) -> None:
    monkeypatch.setattr("cluster.server.openai.serve.connections_of", lambda files: (4, 2))
    served = await serve_http()
    port = served.server.port
    kept = [await asked(port) for _ in range(2)]
    _, _, refused = await asked(port)
    assert refused.startswith(b"HTTP/1.1 429")
    assert b"127.0.0.1 has 2 connections, at most 2 of one host" in refused
    kept[0][1].close()
    await asyncio.sleep(0.05)
    again = await asked(port)
    assert again[2].startswith(b"HTTP/1.1 200")
    for _, writer, _ in (kept[1], again):
        writer.close()


async def test_where_all_http_connections_are_taken_each_host_has_its_share(serve_http, monkeypatch) -> None:
    monkeypatch.setattr("cluster.server.openai.serve.connections_of", lambda files: (6, 3))
    served = await serve_http()
    port = served.server.port
    crowd = [await asked(port, source) for source in ("127.0.0.2", "127.0.0.3") for _ in range(3)]
    mine = [await asked(port, "127.0.0.4") for _ in range(2)]
    assert all(answer.startswith(b"HTTP/1.1 200") for _, _, answer in mine)
    async with asyncio.timeout(PATIENCE_S):
        while sum(reader.at_eof() for reader, _, _ in crowd) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    _, _, refused = await asked(port, "127.0.0.4")
    assert refused.startswith(b"HTTP/1.1 429"), "now each has two"
    assert b"6 connections are open, at most 6 are; 127.0.0.4 has 2" in refused
    for _, writer, _ in (*crowd, *mine):
        writer.close()


class Held:
    """A connection that is held."""

    def __init__(self, idle: bool = True) -> None:
        self.idle = idle
        self.ended = False

    def end(self) -> None:
        self.ended = True


def test_a_connection_on_which_something_is_answered_is_not_taken_away() -> None:
    connections = HostConnections(4, 4)
    busy, idle = [Held(idle=False) for _ in range(3)], Held()
    for each in (*busy, idle):
        connections.add("crowd", each)
    connections.add("me", Held())
    assert idle.ended
    assert not any(each.ended for each in busy)
    with pytest.raises(QueueFullError, match="4 connections are open, at most 4 are; you has 0"):
        connections.add("you", Held())


def test_levels_are_fair() -> None:
    assert fair_level({"a": 9, "b": 3, "c": 1}, 10) == 6
    assert fair_level({"a": 9, "b": 9, "c": 1}, 10) == 4
    assert fair_level({"a": 3, "b": 3}, 10) == 3
    assert fair_level({"a": 9, "b": 9, "c": 9}, 2) == 1


async def test_grpc_connections_are_shared_fairly(serve: Callable, answer: Callable, monkeypatch) -> None:
    """One that has a call is told why it gets no other one."""
    monkeypatch.setattr("cluster.server.grpc.serve.connections_of", lambda files: (16, 3))
    monkeypatch.setattr("cluster.server.grpc.connections.LOOK_S", 0.02)
    served = await serve([answer("ab")[0], asyncio.Event()])
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number in range(5):  # unlike options, so that each has a connection of its own
            channel = grpc.aio.insecure_channel(served.server.address, options=(("test.number", number),))
            await stack.enter_async_context(channel)
            stub = baton_pb2_grpc.BatonStub(channel)
            call = stub.Generate(baton_pb2.GenerateRequest(text="x"))
            await call.read()
            clients.append((stub, call))
        idle = [await asyncio.open_connection("127.0.0.1", served.server.port) for _ in range(4)]
        for reader, writer in idle:
            await until_closed(reader)
            writer.close()
        asked = [stub.GetServerInfo(baton_pb2.GetServerInfoRequest()) for stub, _ in clients]
        statuses = [await each.code() for each in asked]
        assert sorted(map(str, statuses)) == ["StatusCode.OK"] * 3 + ["StatusCode.RESOURCE_EXHAUSTED"] * 2
        refused = [await each.details() for each, status in zip(asked, statuses, strict=True) if status.value[0]]
        assert all("connections, at most 3 of one host are taken now" in text for text in refused)
        for _, call in clients:
            call.cancel()


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_defect(serve_http, caplog) -> None:
    served = await serve_http()
    _, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await asyncio.sleep(0.2)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_deadline_far_away_is_nearer(serve: Callable) -> None:
    served = await serve([asyncio.Event()], max_timeout_s=0.2)
    async with AsyncBatonClient(Connection(served.connection.address)) as client:
        with pytest.raises(BatonClientError, match=r"not finished within the deadline of 0\.2 s") as late:
            await client.generate_once("x", timeout_s=10 * 365 * 86_400.0)
    assert late.value.status is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_part_that_nobody_takes_ends_its_stream() -> None:
    streams, ended = UnreadStreams(0.05), []
    looking = asyncio.create_task(streams.run())

    async def stream(takes_it: bool) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S) as deadline:
                with streams.stream(deadline) as writing:
                    writing.since = asyncio.get_running_loop().time()
                    if takes_it:
                        writing.since = 0.0
                        await asyncio.sleep(0.3)
                    else:
                        await asyncio.Event().wait()
        except TimeoutError:
            ended.append(writing.late)

    await asyncio.gather(stream(True), stream(False))
    looking.cancel()
    assert ended == [True]


async def test_an_answer_over_http_that_nobody_reads_is_given_up(serve_http, answer: Callable, monkeypatch) -> None:
    monkeypatch.setattr(unread.UnreadStreams.__init__, "__defaults__", (0.3,))
    served = await serve_http(answer("a" * 60) * 1)
    _, writer = await asyncio.open_connection("127.0.0.1", served.server.port, limit=2)
    writer.transport.pause_reading()
    body = b'{"model": "tiny", "prompt": "x", "stream": true, "logprobs": 5, "max_tokens": 60}'
    kind = "content-type: application/json\r\ncontent-length: "
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{kind}{len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        while served.server.num_calls or not served.engine.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    writer.close()
