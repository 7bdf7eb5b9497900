"""A service that a benchmark has started, Baton's or a peer's: who asks it, and the processes that it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Client
from benchmarks.server_process import ServerProcess


@dataclass(frozen=True)
class RunningService:
    """A service that is ready.

    Attributes:
        client: sends requests to it.
        address: where it listens; empty where it is several servers.
        servers: its processes, the one that was started first in front.
        vocab_size: of the model.
        max_model_len: tokens of prompt and output together.
    """

    client: Client
    address: str
    servers: Sequence[ServerProcess]
    vocab_size: int
    max_model_len: int

    @property
    def started(self) -> float:
        """`time.perf_counter()` of its start."""
        return self.servers[0].started

    def log_tails(self, lines: int = 40) -> list[list[str]]:
        """The last lines of each process's log."""
        return [server.text().splitlines()[-lines:] for server in self.servers]


async def stop_all(servers: Sequence[ServerProcess]) -> None:
    """Stop processes side by side: each may take its time."""
    await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))
