"""Who may call: a bearer token with the call's role, which every call but the health check must carry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cluster import caller
from cluster.caller import Caller
from cluster.errors import AuthenticationError
from cluster.server.credentials import Credentials
from cluster.server.grpc.errors import status_of
from cluster.wire.auth import HEADER, Role, authorize
from protos import baton_pb2

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_SERVICE = baton_pb2.DESCRIPTOR.services_by_name["Baton"].full_name
_ROLES: dict[str, Role | None] = {
    "Generate": Role.GENERATE,
    "GenerateOnce": Role.GENERATE,
    "Tokenize": Role.GENERATE,
    "GetModelInfo": None,
    "GetServerInfo": None,
    "ListWorkers": Role.OPERATE,
    "Explain": Role.OPERATE,
    "Scale": Role.OPERATE,
}
ROLE_OF_METHOD = {f"/{_SERVICE}/{name}": role for name, role in _ROLES.items()}
"""The role that a call needs, by the full name of its method; None, as for reflection: any token will do."""


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token with UNAUTHENTICATED and those beyond its roles with PERMISSION_DENIED.

    Their body is not read. A method whose role is not known needs the one that operates.

    Args:
        credentials: the good ones, asked for at each call.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Go on to the method, or to a refusal."""
        method = handler_call_details.method
        if method.startswith(_OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = [str(value) for key, value in handler_call_details.invocation_metadata if key == HEADER]
        try:
            tenant = authorize(given, _role(method), self._credentials())
        except AuthenticationError as error:
            return _refusing(error)
        caller.accept(Caller(tenant=tenant))  # where it comes from its handler knows
        return await continuation(handler_call_details)


def host_of(peer: str) -> str:
    """Where a call comes from, of gRPC's name for it, such as `ipv4:10.0.0.7:41234` or `unix:`."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _role(method: str) -> Role | None:
    return ROLE_OF_METHOD.get(method, Role.OPERATE if method.startswith(f"/{_SERVICE}/") else None)


def _refusing(error: AuthenticationError) -> grpc.RpcMethodHandler:
    code, message = status_of(error)

    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, message)

    return grpc.stream_stream_rpc_method_handler(refuse)
