"""What workers say, on its way to whom it is for: token streams, apart from who looks after the workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cluster.pools.replica import Replica
from workers.heartbeat import Heartbeat
from workers.messages import StepOutput


class OutputStream:
    """One worker's output, read by a task of its own from now until it ends.

    Attributes:
        ended: done when there is no more to read, with what the worker's handle or the engine raised; cancel it to stop
            reading.
        num_heard: times that something was heard, heartbeats too.

    Args:
        replica: whose worker has started; what it says of its load and how it gets on is noted there.
        on_output: takes every step's output.
    """

    def __init__(self, replica: Replica, on_output: Callable[[StepOutput], None]) -> None:
        self.num_heard = 0
        self.ended = asyncio.create_task(self._read(replica, on_output), name=f"output of {replica.engine_id}")

    async def _read(self, replica: Replica, on_output: Callable[[StepOutput], None]) -> None:
        async for batch in replica.handle.outputs():
            self.num_heard += 1
            replica.num_heard, replica.heard_at = self.num_heard, time.monotonic()
            for output in batch:
                if isinstance(output, Heartbeat):
                    replica.heartbeat = output
                    continue
                replica.load = output.load
                on_output(output)


class OutputStreams:
    """Reads the workers' outputs and hands them to the engine.

    Args:
        on_output: takes every step's output.
    """

    def __init__(self, on_output: Callable[[StepOutput], None]) -> None:
        self._on_output = on_output

    def open(self, replica: Replica) -> OutputStream:
        """Read what a member's worker says, from now on."""
        return OutputStream(replica, self._on_output)
