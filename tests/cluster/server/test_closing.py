"""Calls that come while the server closes, from clients that never pause."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import grpc
import pytest

from cluster.client.client import AsyncBatonClient, BatonClientError
from cluster.server.grpc import closing

CLIENTS = 16


async def test_whoever_calls_while_the_server_closes_is_told_so(
    serve: Callable[..., Awaitable], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve([])
    monkeypatch.setattr(closing, "ON_THEIR_WAY_S", 0.1)
    monkeypatch.setattr(closing, "GOODBYE_S", 0.05)
    seen: Counter[grpc.StatusCode] = Counter()
    all_call = asyncio.Event()

    async def call_on_and_on() -> None:
        async with AsyncBatonClient(served.connection) as client:
            while True:
                try:
                    await client.model_info(timeout_s=10)
                    seen[grpc.StatusCode.OK] += 1
                    if seen[grpc.StatusCode.OK] == 10 * CLIENTS:
                        all_call.set()
                except BatonClientError as error:
                    seen[error.status] += 1
                    return

    clients = [asyncio.create_task(call_on_and_on()) for _ in range(CLIENTS)]
    await all_call.wait()
    await served.server.stop(grace_s=0)
    await asyncio.wait_for(asyncio.gather(*clients), 20)
    assert set(seen) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert seen[grpc.StatusCode.UNAVAILABLE] == CLIENTS
