"""A worker as the gateway holds it, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.messages import StepOutput, WorkerRequest
from workers.worker_host import WorkerInfo


@dataclass(frozen=True)
class StartProgress:
    """How far a worker's start is.

    Attributes:
        stage: what it does: reads weights, counted in bytes, or captures CUDA graphs.
        done: so much.
        total: of so much.
    """

    stage: Literal["weights", "graphs"]
    done: int
    total: int


HEARTBEAT_S = 1.0
"""A worker that runs lets itself be heard this often."""

LoadProgress = Callable[[str, StartProgress], None]
"""Told of a worker, by name, and how far its start is."""


class WorkerHandle(Protocol):
    """Two implementations: `RayWorker`, an actor in a process of its own, and `InProcessWorker`."""

    name: str
    role: str

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """Load the model and get ready.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            ConfigError: the configuration does not fit.
            WorkerLostError: the worker died.
        """
        ...

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        """Begin to meet a peer, for the first time or once more: how its ranks have to know this worker's, in order.

        Raises:
            LayoutMismatchError: its KV cache is laid out differently.
            KVTransferError: no endpoint can be made.
        """
        ...

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """Make a peer known, by all of its ranks, the lead's first.

        Raises:
            LayoutMismatchError: its KV cache is laid out differently.
            KVTransferError: it cannot be reached.
        """
        ...

    async def probe(self, engine_id: str) -> float:
        """Prove the path to a connected peer; seconds for the round trip.

        Raises:
            KVTransferError: no answer.
        """
        ...

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """What the way to a peer that has been met costs, all ranks together; None: it was not measured."""
        ...

    def submit(self, request: WorkerRequest) -> None:
        """Send a request; what becomes of it comes out of `outputs`."""
        ...

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """Stop an attempt at a request, or one of its samples."""
        ...

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """Tell it that a peer is lost, and whether its processes are known to have ended; see `KVConnector`."""
        ...

    def outputs(self) -> AsyncIterator[list[StepOutput]]:
        """Each step's output, one stream for the whole worker: something every `HEARTBEAT_S` at least, if only an
        empty list, also while a step takes long.

        Raises:
            WorkerLostError: the worker died or crashed.
        """
        ...

    async def stop(self) -> bool:
        """End the worker; never fails.

        Returns:
            Whether its processes are known to have ended, so that nothing of it can write to its peers.
        """
        ...
