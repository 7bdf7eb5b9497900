"""Who may call: a bearer token that every call but the health check must carry."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cluster.errors import AuthenticationError
from cluster.server.grpc.errors import status_of
from cluster.wire.auth import HEADER, bearer

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that do not carry the token with UNAUTHENTICATED, before their body is read."""

    def __init__(self, token: str) -> None:
        self._expected = bearer(token)[1].encode()
        self._refusals = {True: _refusing("the call carries no bearer token"), False: _refusing("wrong bearer token")}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Go on to the method, or to a refusal."""
        if handler_call_details.method.startswith(_OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = [value for key, value in handler_call_details.invocation_metadata if key == HEADER]
        # Compared in constant time, so that the time of a refusal says nothing about the token.
        if len(given) == 1 and hmac.compare_digest(str(given[0]).encode(), self._expected):
            return await continuation(handler_call_details)
        return self._refusals[not given]


def _refusing(reason: str) -> grpc.RpcMethodHandler:
    code, message = status_of(AuthenticationError(reason))

    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, message)

    return grpc.stream_stream_rpc_method_handler(refuse)
