"""The event loop is woken once for all that gRPC has finished."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket

import grpc
import pytest

from cluster.server.grpc import wakeups
from cluster.server.grpc.wakeups import gathered_wakeups


@pytest.mark.parametrize(("gathered", "wakings"), [(True, 1), (False, 5)])
async def test_five_bytes_wake_it_once(gathered: bool, wakings: int) -> None:
    loop = asyncio.get_running_loop()
    mine, grpcs = socket.socketpair()
    mine.setblocking(False)
    seen = []

    def handle(bound: asyncio.AbstractEventLoop) -> None:
        """As gRPC does: a byte at a time."""
        with contextlib.suppress(BlockingIOError):
            mine.recv(1)
        seen.append(bound)

    def bind() -> None:
        loop.add_reader(mine, functools.partial(handle, loop))

    if gathered:
        with gathered_wakeups(loop):
            bind()
    else:
        bind()
    grpcs.send(b"11111")
    for _ in range(20):
        await asyncio.sleep(0)
    assert seen == [loop] * wakings
    loop.remove_reader(mine)
    mine.close()
    grpcs.close()
    assert "add_reader" not in vars(loop)


async def test_this_grpc_binds_itself_as_is_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    woken = []
    read_all = wakeups.read_all
    monkeypatch.setattr(wakeups, "read_all", lambda *what: (woken.append(1), read_all(*what)))
    with gathered_wakeups(asyncio.get_running_loop()):
        server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await channel.unary_unary("/no/thing")(b"")
    await server.stop(None)
    assert woken
