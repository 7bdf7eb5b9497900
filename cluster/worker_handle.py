"""A worker as the gateway holds it, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.heartbeat import Heartbeat
from workers.messages import StepOutput, WorkerRequest
from workers.worker_host import WorkerInfo


@dataclass(frozen=True)
class StartProgress:
    """How far a worker's start is.

    Attributes:
        stage: what it does: reads weights, counted in bytes, or captures CUDA graphs; "process" says how many of its
            processes, one a rank, run and answer.
        done: so much.
        total: of so much.
    """

    stage: Literal["process", "weights", "graphs"]
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

        From when all of its processes run, `progress` is told several times a second how far that is, also where it
        has come no further, as long as all of them answer.

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

    def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        """Each step's output, one stream for the whole worker, and a heartbeat every `HEARTBEAT_S`, also while a step
        takes long.

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

    async def has_ended(self) -> bool:
        """The same, found out once more: where `stop` could not say so, its machine may answer again."""
        ...
