"""What a worker can be told between two steps, as data: the same for every rank of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.decode_worker import DecodeWorker
from workers.messages import CacheUpdate, Load, WorkerEvent, WorkerRequest
from workers.prefill_worker import PrefillWorker


@dataclass(frozen=True)
class Submit:
    """Take a request."""

    request: WorkerRequest


@dataclass(frozen=True)
class Abort:
    """Stop an attempt at a request."""

    attempt_id: str


@dataclass(frozen=True)
class Disconnect:
    """A peer is lost; see `KVConnector.disconnect`."""

    engine_id: str
    confirmed_dead: bool = False


Command = Submit | Abort | Disconnect


def apply_command(worker: PrefillWorker | DecodeWorker, command: Command) -> None:
    """Carry a command out."""
    match command:
        case Abort(attempt_id):
            worker.abort(attempt_id)
        case Disconnect(engine_id, confirmed_dead):
            worker.disconnect(engine_id, confirmed_dead)
        case Submit(request):
            worker.add(request)


class Alone:
    """A worker of one rank, as its loop drives it: commands are carried out at once.

    Args:
        worker: touched through this object only.
    """

    def __init__(self, worker: PrefillWorker | DecodeWorker) -> None:
        self._worker = worker

    def take(self, command: Command) -> None:
        """Carry a command out."""
        apply_command(self._worker, command)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return self._worker.has_work

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Engine ids to which the connection is broken."""
        return self._worker.broken_peers

    @property
    def load(self) -> Load:
        """The load now."""
        return self._worker.load

    def step(self) -> list[WorkerEvent]:
        """Do what is due."""
        return self._worker.step()

    def take_cache_update(self) -> CacheUpdate | None:
        """How the worker's prefix cache has changed since the last call; None: not at all."""
        return self._worker.take_cache_update()
