"""What becomes of calls that come while the server closes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cluster.errors import ShuttingDownError
from cluster.server.grpc.errors import status_of

ON_THEIR_WAY_S = 0.1
"""For calls that have been sent to arrive."""
GOODBYE_S = 0.05
"""For clients to hear that their connections end."""


class LastCalls(grpc.aio.ServerInterceptor):
    """Answers them with UNAVAILABLE.

    gRPC cancels a call that it has received and not yet handed over when it is told to stop, and its client sees
    CANCELLED, though nobody has cancelled it. So before that, calls are taken and not answered: who waits for an answer
    sends nothing new. They are answered when gRPC has told all clients that their connections end.
    """

    def __init__(self) -> None:
        self._closing = False
        self._answer = asyncio.Event()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Go on to the method, unless the server closes."""
        if not self._closing:
            return await continuation(handler_call_details)
        await self._answer.wait()
        return grpc.stream_stream_rpc_method_handler(_refuse)

    async def stop(self, server: grpc.aio.Server, grace_s: float) -> None:
        """Stop the server; calls whose handlers run have so many seconds."""
        self._closing = True
        await asyncio.sleep(ON_THEIR_WAY_S)
        stopping = asyncio.ensure_future(server.stop(grace_s))
        await asyncio.sleep(GOODBYE_S)
        self._answer.set()
        await stopping


async def _refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(*status_of(ShuttingDownError("the service is shutting down: send the request elsewhere")))
