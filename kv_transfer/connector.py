"""The KV connector as a worker sees it: reserve on decode, push from prefill, events on both.

A handoff in order:

    decode   expect(handoff, blocks)            reserves; the prefill worker is sent a grant
    prefill  begin(handoff), push(part)…        parts pushed before the grant arrives wait for it
    prefill  finish(handoff, first token)
    decode   HandoffReceived                    every granted block of every layer and group was counted

Prefill pushes the whole sequence and decode grants the blocks that it lacks, a tail of the sequence: only these are
written.
    prefill  HandoffSent                        nothing is in flight: its blocks are its own again

Whatever goes wrong, decode gets `HandoffFailed` at once and `HandoffReleased` when nobody can write to its blocks any
more; prefill gets `HandoffAborted` when nothing reads its blocks any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo


class ReadyEvent(Protocol):
    """Something that happens before memory may be read, or written; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it has happened."""
        ...


@dataclass(frozen=True)
class HandoffReceived:
    """Decode: the whole cache, or this rank's share of it, has landed; nobody will write to its blocks any more.

    Attributes:
        key: the reservation.
        first_token: of the prompt's first sample.
        other_tokens: the first tokens of its other samples, in order.
    """

    key: HandoffKey
    first_token: int
    other_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class HandoffFailed:
    """Decode: the cache will not become whole. The blocks are not safe yet: wait for `HandoffReleased`."""

    key: HandoffKey
    reason: str


@dataclass(frozen=True)
class HandoffReleased:
    """Decode: after a failure or `cancel`, nobody can write to the blocks any more."""

    key: HandoffKey


@dataclass(frozen=True)
class HandoffSent:
    """Prefill: everything has landed on the other side. Sizes in bytes, times in seconds."""

    handoff_id: bytes
    num_bytes: int
    num_parts: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True)
class HandoffAborted:
    """Prefill: the handoff has ended without success and nothing of it is in flight."""

    handoff_id: bytes
    reason: str


DecodeEvent = HandoffReceived | HandoffFailed | HandoffReleased
PrefillEvent = HandoffSent | HandoffAborted
ConnectorEvent = DecodeEvent | PrefillEvent


class KVConnector(ABC):
    """Hands KV cache from prefill to decode workers. One object serves both roles.

    Every method returns at once; the network is another thread's business. What happens comes out of `poll`.
    """

    @abstractmethod
    def register_kv_caches(self, name: str, kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> EngineInfo:
        """Register the cache and start under a new incarnation of `name`.

        Args:
            name: the worker's.
            kv_caches: by cache group, (num_layers of the group, num_blocks, *block), contiguous.
            layout: what they are.

        Raises:
            LayoutMismatchError: a tensor is not what its layout says; the text has both numbers.
        """

    @abstractmethod
    def connect(self, peer: EngineInfo, timeout_s: float) -> None:
        """Meet a peer, by what its `register_kv_caches` or, for this engine alone, its `new_endpoint` returned.

        Called on both sides; the path itself is proved by `probe`. A peer that was met at another endpoint is met anew.

        Raises:
            LayoutMismatchError: its layout differs; the text lists how.
            PeerError: it cannot be added.
        """

    @abstractmethod
    def probe(self, engine_id: str, timeout_s: float) -> float:
        """Meet a connected peer: data moves there and back once, which also measures the path.

        Returns:
            Seconds that a message takes there and back.

        Raises:
            PeerError: no answer in time, or data does not arrive.
        """

    @abstractmethod
    def new_endpoint(self, peer: EngineInfo, timeout_s: float) -> EngineInfo:
        """Begin to meet a peer, for the first time or once more: make an endpoint for it alone.

        Handoffs that are under way between the two fail. Both sides call this, and then `connect` with what the other
        side's returned: so a connection that broke is replaced. And whatever a peer on another machine can write here
        over an endpoint that was made for it ends when that is closed, which `disconnect` does.

        Returns:
            This engine, as that peer has to know it.

        Raises:
            LayoutMismatchError: its layout differs; the text lists how.
            PeerError: it cannot be made.
        """

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Peers to whom something has failed since they were met, and where each was reached; from any thread."""
        return {}

    def link_to(self, engine_id: str) -> LinkCost | None:
        """What the way to a peer that has been met costs; None: it was not measured."""
        return None

    @abstractmethod
    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """The peer is lost: end its handoffs and, once nothing of it can arrive, release their blocks.

        Nothing can arrive when its process is gone, which this machine's kernel knows of processes here, and somebody
        else of others; or, from another machine, when the endpoint that was made for it is closed.

        Args:
            engine_id: the peer.
            confirmed_dead: whether it is known that its process is gone; may be said later, in a second call.
        """

    # decode

    @abstractmethod
    def expect(
        self, handoff_id: bytes, prefill_engine: str, blocks: Sequence[GroupBlocks], ready: ReadyEvent | None = None
    ) -> HandoffKey:
        """Reserve these blocks for a handoff and grant them to the prefill worker.

        Args:
            handoff_id: of the handoff.
            prefill_engine: who will write.
            blocks: by cache group, for the sequence's blocks from `first_block` to its last; those before it are
                neither granted nor written. None at all is in order: where no group lacks any, the handoff brings the
                first token alone.
            ready: happens before they may be written; the grant waits for it. None: they may.

        Raises:
            ValueError: the groups are not as many as those of the cache.
        """

    @abstractmethod
    def cancel(self, key: HandoffKey) -> None:
        """Stop expecting, and ask the peer to stop until it confirms; `HandoffReleased`: the blocks are safe."""

    # prefill

    @abstractmethod
    def begin(self, handoff_id: bytes, decode_engine: str) -> None:
        """A handoff will be pushed to this decode worker."""

    @abstractmethod
    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """Write these blocks of these layers once `ready`, or this rank's share of them, see `KVLayout.share`.

        The source blocks are in use until `HandoffSent` or `HandoffAborted`. Every (layer, block) is pushed once, from
        the beginning of what the decode side may grant to the prompt's end.

        Args:
            handoff_id: of the handoff.
            group: the cache group.
            layers: places within the group, not the model's numbers.
            first_block: the place in the sequence of the first block.
            src_blocks: this worker's blocks.
            ready: happens before they may be read; None: they may.
        """

    def layers_per_write(
        self,
        peer: str,
        group: int,
        layer_bytes: int,
        layer_s: float = 0.0,
        slack_s: float = 0.0,
        tail_s: float = 0.0,
    ) -> int:
        """How many layers one WRITE to this peer should carry: 1, unless the way to it has been measured.

        Args:
            peer: the decode engine.
            group: the cache group.
            layer_bytes: bytes of one layer's part.
            layer_s: seconds from one layer of the group to its next; 0 when unknown.
            slack_s: seconds of them in which the thread that launches the kernels is idle.
            tail_s: seconds that the step still computes when the last layer's keys and values are there.
        """
        return 1

    @abstractmethod
    def finish(self, handoff_id: bytes, first_token: int, other_tokens: tuple[int, ...] = ()) -> None:
        """Everything has been pushed; hand over the first token, and those of the prompt's other samples."""

    @abstractmethod
    def abort(self, handoff_id: bytes, reason: str) -> None:
        """Stop pushing; the decode side is told, `HandoffAborted` says when the source blocks are free."""

    # both

    @abstractmethod
    def poll(self) -> list[ConnectorEvent]:
        """What has happened since the last call."""

    @abstractmethod
    def set_listener(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever `poll` has something new."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and give everything back."""
