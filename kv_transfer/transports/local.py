"""The connector within one process, which can misbehave on request.

Over host memory a WRITE is so quick that a decode which starts too early still looks right. Here a WRITE takes as long
as a test wants, and parts arrive late, in another order, twice, or never.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_transfer.errors import PeerError
from kv_transfer.layout import KVLayout
from kv_transfer.region import regions_of
from kv_transfer.transports.base import EngineInfo, Landed, Transfer, TransferState, Transport


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
    """The network between the `LocalConnector`s of one process. Thread-safe."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self._random = random.Random(self.faults.seed)
        self._lock = threading.RLock()
        self._ends: dict[str, _End] = {}

    def attach(self, engine_id: str, kv_caches: Sequence[torch.Tensor]) -> None:
        """Add an engine."""
        with self._lock:
            self._ends[engine_id] = _End(tuple(kv_caches), [])

    def detach(self, engine_id: str) -> None:
        """Take an engine away: WRITEs on their way to it fail, what it sent goes on."""
        with self._lock:
            end = self._ends.pop(engine_id, None)
            for arrival in end.arrivals if end is not None else ():
                if arrival.copy is not None:
                    arrival.copy.transfer.ended = TransferState.FAILED

    def cut(self, sender: str, peer: str) -> None:
        """`peer` takes nothing more from `sender`: WRITEs on their way fail, messages are lost."""
        with self._lock:
            if (end := self._ends.get(peer)) is None:
                return
            for arrival in end.arrivals:
                if arrival.sender == sender and arrival.copy is not None:
                    arrival.copy.transfer.ended = TransferState.FAILED
            end.arrivals = [arrival for arrival in end.arrivals if arrival.sender != sender]

    def send(self, sender: str, peer: str, message: bytes) -> None:
        """Put a message on its way."""
        with self._lock:
            self._arrive(self._end(peer), _Arrival(self._delay(), sender, message))

    def write(
        self, sender: str, peer: str, group: int, layers: range, src: Sequence[int], dst: Sequence[int], message: bytes
    ) -> LocalTransfer:
        """Put data and a message on their way. The source is read when the data lands, as a slow card would."""
        with self._lock:
            end = self._end(peer)
            transfer = LocalTransfer()
            roll = self._random.random()
            source, target = self._end(sender).kv_caches[group], end.kv_caches[group]
            copy = _Copy(source, target, layers, tuple(src), tuple(dst), transfer)
            if roll < self.faults.drop:
                transfer.ended = TransferState.DONE
            elif roll < self.faults.drop + self.faults.fail:
                copy.src, copy.dst = copy.src[::2], copy.dst[::2]
                copy.outcome = TransferState.FAILED
                end.arrivals.append(_Arrival(self._delay(), sender, None, copy))
            else:
                self._arrive(end, _Arrival(self._delay(), sender, message, copy))
            return transfer

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
            return [(arrival.sender, arrival.message) for arrival in due if arrival.message is not None]

    def _arrive(self, end: _End, arrival: _Arrival) -> None:
        end.arrivals.append(arrival)
        if self._random.random() < self.faults.duplicate:
            end.arrivals.append(_Arrival(arrival.rounds + self._delay(), arrival.sender, arrival.message))

    def _delay(self) -> int:
        return self._random.randint(0, self.faults.max_delay)

    def _end(self, engine_id: str) -> _End:
        if engine_id not in self._ends:
            raise PeerError(f"{engine_id} is gone")
        return self._ends[engine_id]


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
        layers = slice(self.layers.start, self.layers.stop)
        self.target[layers, list(self.dst)] = self.source[layers, list(self.src)]
        self.transfer.ended = self.outcome


@dataclass
class _Arrival:
    rounds: int
    sender: str
    message: bytes | None
    copy: _Copy | None = None


@dataclass
class _End:
    kv_caches: tuple[torch.Tensor, ...]
    arrivals: list[_Arrival]


class LocalTransport(Transport):
    """One engine's end of a `LocalFabric`."""

    def __init__(self, fabric: LocalFabric) -> None:
        self._fabric = fabric
        self._engine_id = ""
        self._peers: set[str] = set()

    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        """See `Transport.register`."""
        regions = regions_of(kv_caches, layout)
        self._engine_id = engine_id
        self._fabric.attach(engine_id, kv_caches)
        return EngineInfo(engine_id, incarnation, layout, regions, kv_caches[0].device.type, 0, b"")

    def add_peer(self, peer: EngineInfo) -> None:
        """See `Transport.add_peer`."""
        self._peers.add(peer.engine_id)

    def remove_peer(self, engine_id: str) -> None:
        """See `Transport.remove_peer`."""
        self._peers.discard(engine_id)
        self._fabric.cut(engine_id, self._engine_id)

    def write(
        self,
        peer: str,
        group: int,
        layers: range,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        message: bytes,
    ) -> Transfer:
        """See `Transport.write`."""
        self._check(peer)
        return self._fabric.write(self._engine_id, peer, group, layers, src_blocks, dst_blocks, message)

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        """Within one process nothing is dear the first time, and nothing is written."""
        self._check(peer)
        return Landed()

    def send(self, peer: str, message: bytes) -> None:
        """See `Transport.send`."""
        self._check(peer)
        self._fabric.send(self._engine_id, peer, message)

    def receive(self) -> list[tuple[str, bytes]]:
        """See `Transport.receive`."""
        return self._fabric.receive(self._engine_id)

    def close(self) -> None:
        """See `Transport.close`."""
        self._fabric.detach(self._engine_id)

    def _check(self, peer: str) -> None:
        if peer not in self._peers:
            raise PeerError(f"{peer} is not connected")
