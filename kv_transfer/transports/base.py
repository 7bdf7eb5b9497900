"""What a connector needs of the thing that moves bytes. One thread owns a transport; no method is thread-safe."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_transfer.layout import KVLayout

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
        num_blocks: blocks that it has.
        address: of the cache's first byte in its process.
        device_type: "cpu" or "cuda".
        device_index: of the card, 0 for the CPU.
        metadata: the transport's own, opaque here.
        probe_address: of memory that peers may write to while they meet this worker, on the same device.
    """

    engine_id: str
    incarnation: int
    layout: KVLayout
    num_blocks: int
    address: int
    device_type: str
    device_index: int
    metadata: bytes
    probe_address: int = 0


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
    def register(self, engine_id: str, incarnation: int, kv_cache: torch.Tensor, layout: KVLayout) -> EngineInfo:
        """Make the cache, (num_layers, num_blocks, *block), known to the network; call once."""

    @abstractmethod
    def add_peer(self, peer: EngineInfo) -> None:
        """Make a peer reachable; one that is already stays so.

        Raises:
            PeerError: it cannot be.
        """

    @abstractmethod
    def remove_peer(self, engine_id: str) -> None:
        """Forget a peer. Transfers in flight are not cancelled by it."""

    @abstractmethod
    def write(
        self, peer: str, layers: range, src_blocks: Sequence[int], dst_blocks: Sequence[int], message: bytes
    ) -> Transfer:
        """Start writing blocks of some layers; the peer receives `message` after the data.

        Raises:
            PeerError: the peer is unknown or gone.
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
            PeerError: the peer is unknown or gone.
        """

    @abstractmethod
    def receive(self) -> list[tuple[str, bytes]]:
        """Messages that have arrived since the last call, as (peer, message). Also makes the network progress."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
