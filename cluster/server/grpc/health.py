"""The standard health service, by name, with a reason beside each answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from cluster.gateway.readiness import Health
from cluster.wire.health_reason import reason_metadata
from protos import baton_pb2

LIVENESS = "liveness"
"""SERVING from the first moment until the process stops: it answers. Restart it if not."""
READINESS = ("", baton_pb2.DESCRIPTOR.services_by_name["Baton"].full_name, "readiness")
"""SERVING when a request that comes now is likely to be answered. Besides, every group of workers has its name."""

_STATUS = health_pb2.HealthCheckResponse


class HealthBoard(health.aio.HealthServicer):
    """What health checks are told.

    Liveness is SERVING at once; readiness waits for the first report. Once the service drains, it stays NOT_SERVING.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[str, str] = {}
        self._draining = False

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """One answer, with its reason."""
        context.set_trailing_metadata(reason_metadata(self._reasons.get(request.service, "")))
        return await super().Check(request, context)

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
