"""A rank's copy of its worker, and all that a step of it depends on."""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from workers.commands import Command, apply_command
from workers.decode_worker import DecodeWorker
from workers.lockstep.agreement import GroupEvent
from workers.lockstep.connector import AgreedConnector
from workers.messages import CacheUpdate, Load, TokenOutput, WorkerEvent
from workers.parallel.errors import TensorParallelError
from workers.prefill_worker import PrefillWorker


class StepClock:
    """A worker's clock that stands still within a step: monotonic seconds at the step's start, by the lead's clock."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        """What time it is."""
        return self.now


@dataclass(frozen=True)
class StepInput:
    """All that a step depends on.

    Attributes:
        number: counts the steps.
        now: the lead's clock.
        events: what all ranks agreed on since the last step.
        commands: what the worker was told since the last step.
        digest: of what came out of the last step on the lead.
    """

    number: int
    now: float
    events: tuple[GroupEvent, ...]
    commands: tuple[Command, ...]
    digest: int


@dataclass(frozen=True)
class Crashed:
    """A follower's last report."""

    reason: str


class Replica:
    """A rank's copy of the worker.

    Args:
        worker: whose clock is `clock` and whose connector is `connector`.
        connector: the rank's.
        clock: set at every step.
    """

    def __init__(self, worker: PrefillWorker | DecodeWorker, connector: AgreedConnector, clock: StepClock) -> None:
        self.worker = worker
        self._connector = connector
        self._clock = clock
        self.number = 0
        self.digest = 0
        self.cache_update: CacheUpdate | None = None
        """How the prefix cache has changed with the last step. Only the lead's is told: the others' are equal."""

    def run(self, given: StepInput) -> list[WorkerEvent]:
        """Take a step.

        Raises:
            TensorParallelError: this rank's last step had another outcome than the lead's, or a step is missing.
        """
        if (given.number, given.digest) != (self.number, self.digest):
            raise TensorParallelError(
                f"the ranks are no longer equal: step {given.number - 1} of the lead came out as {given.digest:08x}, "
                f"step {self.number - 1} of this rank as {self.digest:08x}"
            )
        self._clock.now = given.now
        self._connector.deliver(given.events)
        for command in given.commands:
            apply_command(self.worker, command)
        events = self.worker.step()
        self.number += 1
        self.digest = digest_of(self.worker.load, events)
        self.cache_update = self.worker.take_cache_update()
        return events


def digest_of(load: Load, events: Sequence[WorkerEvent]) -> int:
    """A number that two steps with the same outcome have in common, and two others hardly ever: a CRC-32."""
    tokens = array("q", [event.token_id if isinstance(event, TokenOutput) else -1 for event in events])
    names = "\n".join([event.attempt_id for event in events])
    counts = (load.free_blocks, load.reserved_blocks, load.running, load.waiting, load.waiting_tokens, load.preempted)
    return zlib.crc32(array("q", counts), zlib.crc32(names.encode(), zlib.crc32(tokens)))
