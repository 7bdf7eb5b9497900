"""What every endpoint shares: what is served, how the service is, and the calls under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from cluster.api import Engine, ModelInfo
from cluster.errors import StartingError
from cluster.gateway.readiness import Health
from cluster.generation.text_generation import Generation
from cluster.server.call_gate import CallGate
from cluster.server.pacing import Pacer
from cluster.server.unread import UnreadStreams


@dataclass(frozen=True)
class Served:
    """What is behind the door, once it is there.

    Attributes:
        generation: takes text.
        engine: takes token ids.
        model_info: what is served.
        since: when it began, seconds since 1970.
    """

    generation: Generation
    engine: Engine
    model_info: ModelInfo
    since: int = field(default_factory=lambda: int(time.time()))


class Door:
    """State of one HTTP server.

    Attributes:
        default_timeout_s: a call's deadline.
        gate: what calls of new work pass.
        pacer: when streams send.
        unread: ends those that nobody reads.
        health: as last reported; the reason is what a start is at.
        draining: no new work is taken any more.
    """

    def __init__(self, default_timeout_s: float) -> None:
        self.default_timeout_s = default_timeout_s
        self.gate = CallGate()
        self.pacer = Pacer()
        self.unread = UnreadStreams()
        self.health = Health()
        self.draining = False
        self._served: Served | None = None
        self._step = "it has just begun"

    @property
    def served(self) -> Served:
        """What is served.

        Raises:
            StartingError: nothing yet.
        """
        if self._served is None:
            raise StartingError(self._step)
        return self._served

    def starting(self, step: str) -> None:
        """What the start is at."""
        self._step = step
        if self._served is None:
            self.health = Health(False, str(StartingError(step)))

    def serve(self, served: Served, health: Health) -> None:
        """Answer from now on."""
        self._served, self.health = served, health

    def drain(self, reason: str) -> None:
        """Not ready any more, for good, and closed for new work."""
        self.gate.close()
        self.draining, self.health = True, Health(False, reason)


def door_of(request: Request) -> Door:
    """The door that a request came through."""
    door: Door = request.app.state.door
    return door


def served_of(request: Request) -> Served:
    """What is served behind the door that a request came through.

    Raises:
        StartingError: nothing yet.
    """
    return door_of(request).served
