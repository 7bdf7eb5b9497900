"""What requests hold of memory: bounded, from their first byte to the end of their answers, and fair between hosts."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import grpc
import httpx2
import pytest

from cluster.errors import QueueFullError
from cluster.server import held_bytes
from cluster.server.held_bytes import HeldBytes
from protos import baton_pb2, baton_pb2_grpc

PATIENCE_S = 30.0


def test_all_is_bounded_and_what_has_ended_counts_no_more() -> None:
    held = HeldBytes(100)
    with held.request("a") as one:
        one.add(30)
        with held.request("a") as other:
            other.add(20)
            with pytest.raises(QueueFullError, match="requests of a hold 51 bytes, at most 50 of one host"):
                other.add(1)
        one.add(20)
        assert held.size == 50
    assert held.size == 0


async def test_a_host_with_less_gets_room_from_the_one_with_most() -> None:
    held = HeldBytes(100)
    coming, ended = asyncio.Event(), []

    async def half(host: str, size: int) -> None:
        with held.request(host) as request:
            request.add(size)
            try:
                async with request.coming():
                    await coming.wait()
            except QueueFullError:
                ended.append((host, size))

    halves = [asyncio.create_task(half(host, size)) for host in "ab" for size in (20, 30)]
    await asyncio.sleep(0)
    with ExitStack() as stack:
        mine = stack.enter_context(held.request("c"))
        mine.add(10)
        await asyncio.sleep(0.05)
        assert [size for _, size in ended] == [30], "the largest of a host with most"
        mine.add(20)
        with pytest.raises(QueueFullError, match="requests of c hold 60 bytes, at most 50"):
            mine.add(30)
        assert held.size == 100
    coming.set()
    await asyncio.gather(*halves)
    assert held.size == 0


async def test_what_is_answered_is_not_given_up() -> None:
    held = HeldBytes(100)
    with held.request("a") as one, held.request("b") as two, held.request("c") as three:
        one.add(50)
        two.add(50)
        with pytest.raises(QueueFullError, match="requests hold 100 bytes, and at most 100 may be held"):
            three.add(1)


async def test_both_doors_refuse_what_is_too_much(serve, serve_http, answer, monkeypatch) -> None:
    """The first one is still answered: its bytes are held."""
    monkeypatch.setattr(held_bytes.HeldBytes.__init__, "__defaults__", (20_000,))
    go_on = asyncio.Event()
    first, *rest = answer("ab")
    served, over_http = await serve([first, go_on, *rest]), await serve_http([first, go_on, *rest])
    large = "x" * 50
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        request = baton_pb2.GenerateRequest(text=large, sampling={"bad_words": ["w" * 6000]})
        call = stub.Generate(request)
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError, match="at most 10000 of one host") as refused:
            await stub.GenerateOnce(request)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        body = {"prompt": large, "max_tokens": 2, "nobody_knows": "w" * 6000, "stream": True}
        async with httpx2.AsyncClient(base_url=over_http.server.url, timeout=PATIENCE_S) as client:
            async with client.stream("POST", "/v1/completions", json=body) as got:
                lines = got.aiter_lines()
                await anext(lines)
                no = await client.post("/v1/completions", json=body)
                assert (no.status_code, no.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                go_on.set()
                assert got.status_code == 200
                _ = [line async for line in lines]
            assert (await client.post("/v1/completions", json={**body, "stream": False})).status_code == 200
        call.cancel()
