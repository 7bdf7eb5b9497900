"""What a connector needs of the thing that moves bytes. One thread owns a transport; no method is thread-safe."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kv_transfer.layout import KVLayout
from kv_transfer.process import ProcessId
from kv_transfer.region import Region

PROBE_PIECE_BYTES = 65_536
PROBE_PIECES = 128
"""Of the memory that workers keep for meeting each other, one piece after the other."""


class TransferState(enum.Enum):
    """What became of a WRITE. Only the last two are terminal: until then its memory is in use on both sides."""

    IN_FLIGHT = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True)
class EngineInfo:
    """What a worker tells its peers about itself.

    Attributes:
        engine_id: name and incarnation; a restarted worker has another one.
        incarnation: 64 random bits, new at every start.
        layout: of its KV cache.
        regions: its memory, by cache group.
        device_type: "cpu" or "cuda".
        device_index: of the card, 0 for the CPU.
        metadata: the transport's own, opaque here.
        probe_address: of memory that peers may write to while they meet this worker, on the same device.
        endpoint: what `metadata` leads to: the worker's shared one, or one that was made for a single peer.
        process: which the engine is; None: nobody can look.
    """

    engine_id: str
    incarnation: int
    layout: KVLayout
    regions: tuple[Region, ...]
    device_type: str
    device_index: int
    metadata: bytes
    probe_address: int = 0
    endpoint: str = ""
    process: ProcessId | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the group that bounds how many tokens fit."""
        return self.regions[self.layout.primary_index].num_blocks


class Transfer(ABC):
    """One WRITE under way."""

    @abstractmethod
    def state(self) -> TransferState:
        """What became of it; gives its resources back once terminal."""


class Landed(Transfer):
    """One that was done at once."""

    def state(self) -> TransferState:
        """See `Transfer.state`."""
        return TransferState.DONE


class Transport(ABC):
    """Writes blocks into a peer's cache and carries short messages."""

    @abstractmethod
    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        """Make the cache known to the network: a tensor (num_layers, num_blocks, *block) a group; call once.

        Raises:
            LayoutMismatchError: a tensor is not what its layout says.
        """

    @abstractmethod
    def new_endpoint(self, engine_id: str) -> EngineInfo:
        """Make an endpoint for one peer alone, with a name of its own, and close the one that it had.

        What was under way between the two ends, and the peer has to be added again, with its own new endpoint. So
        nothing is left of a connection that broke, which would refuse everything for ever, and nothing of the old one
        arrives at the new one.

        Returns:
            What the peer needs to know in order to add this worker.
        """

    @abstractmethod
    def add_peer(self, peer: EngineInfo) -> None:
        """Make a peer reachable; one that is already, at the same endpoint, stays so.

        Raises:
            PeerError: it cannot be.
        """

    @abstractmethod
    def remove_peer(self, engine_id: str) -> None:
        """Forget a peer, and close the endpoint that was made for it. That stops no WRITE of the peer's: `may_land`."""

    @abstractmethod
    def may_land(self, engine_id: str, confirmed_dead: bool) -> bool:
        """Whether something may still be written here by a peer that has been removed.

        No clock is asked. Nothing lands any more when the peer's process is gone, or when it wrote through the network
        to an endpoint that is closed; within a machine data goes past endpoints, and only the former counts.

        Args:
            engine_id: the peer.
            confirmed_dead: whether somebody who knows says that its process is gone; believed where one cannot look.
        """

    @property
    @abstractmethod
    def broken_peers(self) -> Mapping[str, str]:
        """Peers to whom something has failed since they were added, and the endpoint at which each was reached."""

    @abstractmethod
    def write(
        self,
        peer: str,
        group: int,
        layers: range,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        message: bytes,
    ) -> Transfer:
        """Start writing blocks of some layers of a cache group; the peer receives `message` after the data.

        Raises:
            NotConnectedError: the peer is unknown.
            PeerError: it is gone, the connection is broken, or one of the two has no such block.
        """

    @abstractmethod
    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        """Start writing some of the `PROBE_PIECES` pieces of memory that nobody uses; neighbours travel as one.

        Raises:
            PeerError: the peer is unknown or gone.
        """

    @abstractmethod
    def send(self, peer: str, message: bytes) -> None:
        """Send a message without data.

        Raises:
            NotConnectedError: the peer is unknown: the message was not sent.
            PeerError: it is gone, or the connection is broken: the message may have been sent.
        """

    @abstractmethod
    def receive(self) -> list[tuple[str, bytes]]:
        """Messages that have arrived since the last call, as (peer, message). Also makes the network progress."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
