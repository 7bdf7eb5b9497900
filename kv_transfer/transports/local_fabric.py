"""The network within one process, which can misbehave on request.

Over host memory a WRITE is so quick that a decode which starts too early still looks right. Here a WRITE takes as long
as a test wants, and parts arrive late, in another order, twice, or never. What nobody can stop in a real network goes
on here, too: a WRITE that was posted lands when its time comes, whatever its target has decided meanwhile.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kv_transfer.errors import PeerError
from kv_transfer.region import check_blocks
from kv_transfer.transports.base import Transfer, TransferState


@dataclass(frozen=True)
class Faults:
    """What goes wrong, each with its probability per WRITE or message, decided by `seed`.

    Attributes:
        seed: of the fabric's random numbers.
        max_delay: WRITEs and messages take 0 to this many rounds of the receiver; more than 0 also reorders them.
        duplicate: a message arrives twice, the second time up to `max_delay` rounds later.
        drop: a WRITE is reported as done but neither its data nor its message arrives.
        fail: a WRITE ends in an error, with some of its data written.
    """

    seed: int = 0
    max_delay: int = 0
    duplicate: float = 0.0
    drop: float = 0.0
    fail: float = 0.0


class LocalFabric:
    """The network between the `LocalConnector`s of one process. Thread-safe.

    Endpoints have names: an engine's own, which is its id, and those that it opens, its id with a number behind "#".

    Args:
        faults: what goes wrong.
        direct: WRITEs go past endpoints, as within a machine: a closed one stops none of them.
    """

    def __init__(self, faults: Faults | None = None, *, direct: bool = False) -> None:
        self.faults = faults or Faults()
        self.direct = direct
        self._random = random.Random(self.faults.seed)
        self._lock = threading.RLock()
        self._ends: dict[str, _End] = {}
        self._broken: set[frozenset[str]] = set()

    def attach(self, engine_id: str, kv_caches: Sequence[torch.Tensor]) -> None:
        """Add an engine."""
        with self._lock:
            self._ends[engine_id] = _End(tuple(kv_caches), {engine_id})

    def detach(self, engine_id: str) -> None:
        """An engine's process ends: WRITEs on their way to it fail, what it sent goes on."""
        with self._lock:
            end = self._ends.pop(engine_id, None)
            for arrival in end.arrivals if end is not None else ():
                arrival.fail()

    def open(self, endpoint: str) -> None:
        """Add an endpoint to its engine."""
        with self._lock:
            self._end(endpoint).endpoints.add(endpoint)

    def close(self, endpoint: str) -> None:
        """End an endpoint: what is on its way to it or from it never arrives, unless the fabric is direct."""
        with self._lock:
            if (end := self._ends.get(_engine(endpoint))) is not None:
                end.endpoints.discard(endpoint)
            self._drop(lambda arrival: endpoint in arrival.link, lambda a: self.direct and a.link[1] == endpoint)

    def reset(self, one: str, other: str) -> None:
        """Break every connection between two engines, once and for all; new endpoints can make new ones."""
        with self._lock:
            pairs = [(a, b) for a in self._end(one).endpoints for b in self._end(other).endpoints]
            self._broken |= {frozenset(pair) for pair in pairs}
            self._drop(lambda arrival: frozenset(arrival.link) in self._broken, lambda arrival: False)

    def lose(self, wanted: Callable[[bytes], bool]) -> int:
        """Take messages off their way; returns how many."""
        with self._lock:
            before = sum(len(end.arrivals) for end in self._ends.values())
            for end in self._ends.values():
                end.arrivals = [a for a in end.arrivals if a.message is None or not wanted(a.message)]
            return before - sum(len(end.arrivals) for end in self._ends.values())

    def is_broken(self, own: str, peer: str) -> bool:
        """Whether nothing goes from one endpoint to the other any more."""
        with self._lock:
            end = self._ends.get(_engine(peer))
            return end is None or peer not in end.endpoints or frozenset((own, peer)) in self._broken

    def runs(self, engine_id: str) -> bool:
        """Whether an engine's process has not ended."""
        with self._lock:
            return engine_id in self._ends

    def has_data(self, sender: str, engine_id: str) -> bool:
        """Whether WRITEs of an engine are on their way to another one."""
        with self._lock:
            end = self._ends.get(engine_id)
            arrivals = end.arrivals if end is not None else ()
            return any(arrival.copy is not None and _engine(arrival.link[0]) == sender for arrival in arrivals)

    def send(self, sender: str, peer: str, message: bytes) -> None:
        """Put a message on its way from one endpoint to another."""
        with self._lock:
            self._arrive(self._reachable(sender, peer), _Arrival(self._delay(), (sender, peer), message))

    def write(
        self,
        sender: str,
        peer: str,
        group: int,
        layers: range,
        src: Sequence[int],
        dst: Sequence[int],
        message: bytes,
    ) -> LocalTransfer:
        """Put data and a message on their way. The source is read when the data lands, as a slow card would."""
        with self._lock:
            end = self._reachable(sender, peer)
            transfer = LocalTransfer()
            roll = self._random.random()
            source, target = self._end(sender).kv_caches[group], end.kv_caches[group]
            check_blocks(src, source.shape[1], _engine(sender))
            check_blocks(dst, target.shape[1], _engine(peer))
            copy = _Copy(source, target, layers, tuple(src), tuple(dst), transfer)
            link = (sender, peer)
            if roll < self.faults.drop:
                transfer.ended = TransferState.DONE
            elif roll < self.faults.drop + self.faults.fail:
                copy.src, copy.dst = copy.src[::2], copy.dst[::2]
                copy.outcome = TransferState.FAILED
                end.arrivals.append(_Arrival(self._delay(), link, None, copy))
            else:
                self._arrive(end, _Arrival(self._delay(), link, message, copy))
            return transfer

    def source_blocks(self, engine_id: str) -> frozenset[int]:
        """The blocks of this engine, of any cache group, that WRITEs on their way are still going to read."""
        with self._lock:
            caches = self._end(engine_id).kv_caches
            arrivals = (arrival for end in self._ends.values() for arrival in end.arrivals)
            copies = [arrival.copy for arrival in arrivals if arrival.copy is not None]
            own = [copy for copy in copies if any(copy.source is cache for cache in caches)]
            return frozenset(block for copy in own for block in copy.src)

    def receive(self, engine_id: str) -> list[tuple[str, bytes]]:
        """Let one round pass for this engine; what is due lands."""
        with self._lock:
            end = self._ends.get(engine_id)
            if end is None:
                return []
            due = [arrival for arrival in end.arrivals if arrival.rounds <= 0]
            end.arrivals = [arrival for arrival in end.arrivals if arrival.rounds > 0]
            for arrival in end.arrivals:
                arrival.rounds -= 1
            for arrival in due:
                if arrival.copy is not None:
                    arrival.copy.run()
            return [(_engine(arrival.link[0]), arrival.message) for arrival in due if arrival.message is not None]

    def _arrive(self, end: _End, arrival: _Arrival) -> None:
        end.arrivals.append(arrival)
        if self._random.random() < self.faults.duplicate:
            end.arrivals.append(_Arrival(arrival.rounds + self._delay(), arrival.link, arrival.message))

    def _drop(self, lost: Callable[[_Arrival], bool], goes_on: Callable[[_Arrival], bool]) -> None:
        """Take what is lost off its way; data that goes on lands all the same, but nobody is told of it."""
        for end in self._ends.values():
            kept = []
            for arrival in end.arrivals:
                if not lost(arrival):
                    kept.append(arrival)
                    continue
                arrival.fail()
                if arrival.copy is not None and goes_on(arrival):
                    kept.append(_Arrival(arrival.rounds, arrival.link, None, arrival.copy))
            end.arrivals = kept

    def _delay(self) -> int:
        return self._random.randint(0, self.faults.max_delay)

    def _reachable(self, sender: str, peer: str) -> _End:
        end = self._end(peer)
        if self.is_broken(sender, peer):
            raise PeerError(f"the connection to {_engine(peer)} is broken")
        return end

    def _end(self, endpoint: str) -> _End:
        engine_id = _engine(endpoint)
        if engine_id not in self._ends:
            raise PeerError(f"{engine_id} is gone")
        return self._ends[engine_id]


def _engine(endpoint: str) -> str:
    return endpoint.partition("#")[0]


class LocalTransfer(Transfer):
    """A WRITE under way in a `LocalFabric`."""

    def __init__(self) -> None:
        self.ended = TransferState.IN_FLIGHT

    def state(self) -> TransferState:
        """See `Transfer.state`."""
        return self.ended


@dataclass
class _Copy:
    source: torch.Tensor
    target: torch.Tensor
    layers: range
    src: tuple[int, ...]
    dst: tuple[int, ...]
    transfer: LocalTransfer
    outcome: TransferState = TransferState.DONE

    def run(self) -> None:
        layers = slice(self.layers.start, self.layers.stop, self.layers.step)
        self.target[layers, list(self.dst)] = self.source[layers, list(self.src)]
        if self.transfer.ended is TransferState.IN_FLIGHT:
            self.transfer.ended = self.outcome


@dataclass
class _Arrival:
    """Something on its way over a link: from one endpoint to another."""

    rounds: int
    link: tuple[str, str]
    message: bytes | None
    copy: _Copy | None = None

    def fail(self) -> None:
        if self.copy is not None:
            self.copy.transfer.ended = TransferState.FAILED


@dataclass
class _End:
    """An engine's memory, its open endpoints, and what is on its way to it."""

    kv_caches: tuple[torch.Tensor, ...]
    endpoints: set[str]
    arrivals: list[_Arrival] = field(default_factory=list)
