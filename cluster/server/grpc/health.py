"""The standard health service, by name, with a reason beside each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from cluster.gateway.readiness import Health
from cluster.request_id import MAX_NAME_BYTES
from cluster.server.grpc.access import host_of
from cluster.server.host_counts import HostCounts
from cluster.wire.health_reason import reason_metadata
from protos import baton_pb2

LIVENESS = "liveness"
"""SERVING from the first moment until the process stops: it answers. Restart it if not."""
READINESS = ("", baton_pb2.DESCRIPTOR.services_by_name["Baton"].full_name, "readiness")
"""SERVING when a request that comes now is likely to be answered. Besides, every group of workers has its name."""

MAX_WATCHES, MAX_WATCHES_OF_HOST = 1024, 64

_STATUS = health_pb2.HealthCheckResponse


def watches_of(max_calls: int | None) -> HostCounts:
    """How many watches there may be where so many calls of any kind may be under way: they leave most of these."""
    most = MAX_WATCHES if max_calls is None else min(MAX_WATCHES, max(1, max_calls // 4))
    return HostCounts(most, min(MAX_WATCHES_OF_HOST, max(1, most // 2)))


class HealthBoard(health.aio.HealthServicer):
    """What health checks are told.

    Liveness is SERVING at once; readiness waits for the first report. Once the service drains, it stays NOT_SERVING.

    Args:
        watches: how many calls may stay to be told of changes, which anybody may make.
    """

    def __init__(self, watches: HostCounts | None = None) -> None:
        super().__init__()
        self._reasons: dict[str, str] = {}
        self._draining = False
        self._watches = HostCounts(MAX_WATCHES, MAX_WATCHES_OF_HOST) if watches is None else watches

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """One answer, with its reason."""
        context.set_trailing_metadata(reason_metadata(self._reasons.get(request.service, "")))
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        """One answer after each change, as long as there is room for somebody who stays."""
        host = host_of(context.peer())
        if len(request.service) > MAX_NAME_BYTES:
            text = f"service has {len(request.service)} characters, at most {MAX_NAME_BYTES} are allowed"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        if not self._watches.take(host):
            most, of_one = self._watches.most, self._watches.most_of_one
            text = f"too many calls watch: at most {of_one} of one host may, and {most} in all; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            return  # it has left, or the server stops: gRPC would log a traceback
        finally:
            self._watches.give_back(host)

    async def start(self, reason: str) -> None:
        """Alive, and not ready for this reason."""
        await self._put({LIVENESS: "", **dict.fromkeys(READINESS, reason)}, dict.fromkeys(READINESS, False))

    async def report(self, found: Health) -> None:
        """How the service is, from now on."""
        if self._draining:
            return
        reasons = {**found.groups, **dict.fromkeys(READINESS, found.reason)}
        ready = {key: not text for key, text in found.groups.items()} | dict.fromkeys(READINESS, found.ready)
        await self._put(reasons, ready)

    async def drain(self, reason: str) -> None:
        """Not ready any more, for good."""
        self._draining = True
        await self._put(dict.fromkeys(READINESS, reason), dict.fromkeys(READINESS, False))

    async def _put(self, reasons: Mapping[str, str], ready: Mapping[str, bool]) -> None:
        self._reasons.update(reasons)
        for name in reasons:
            await self.set(name, _STATUS.SERVING if ready.get(name, True) else _STATUS.NOT_SERVING)
