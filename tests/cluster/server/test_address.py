"""Addresses that servers are bound to."""

from __future__ import annotations

import asyncio
import socket

from cluster.server.address import bind


async def test_small_answers_do_not_wait_for_acknowledgements() -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.put_nowait(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    bound = bind("server", "127.0.0.1", 0, "")
    async with await asyncio.start_server(note, sock=bound):
        _, writer = await asyncio.open_connection(*bound.getsockname())
        async with asyncio.timeout(30):
            assert await seen.get() == 1
        writer.close()
