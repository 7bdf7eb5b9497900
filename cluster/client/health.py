"""Asks the standard health service."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.wire.health_reason import reason_in


def check(channel: grpc.Channel, service: str = "", timeout_s: float | None = None) -> tuple[bool, str]:
    """Whether a server is SERVING under this name, and the reason that it gives.

    Args:
        channel: to the server.
        service: empty or "readiness", "liveness", or a group of workers such as "decode".
        timeout_s: deadline.

    Raises:
        grpc.RpcError: no answer, or the name is not known.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    response, call = health_pb2_grpc.HealthStub(channel).Check.with_call(request, timeout=timeout_s)
    return response.status == health_pb2.HealthCheckResponse.SERVING, reason_in(call.trailing_metadata())


async def check_async(channel: grpc.aio.Channel, service: str = "", timeout_s: float | None = None) -> tuple[bool, str]:
    """`check` over an asyncio channel."""
    request = health_pb2.HealthCheckRequest(service=service)
    call = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    response = await call
    serving = response.status == health_pb2.HealthCheckResponse.SERVING
    return serving, reason_in(await call.trailing_metadata())
