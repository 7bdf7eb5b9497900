"""A NIXL agent with the cache registered: the only file that imports NIXL."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kv_transfer.errors import NotConnectedError, PeerError
from kv_transfer.region import check_blocks
from kv_transfer.transports.base import PROBE_PIECE_BYTES, PROBE_PIECES, EngineInfo
from kv_transfer.transports.nixl_transfer import STATES, NixlTransfer

try:
    from nixl._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle
except ModuleNotFoundError:
    # The package `nixl` only picks one of nixl_cu13 and nixl_cu12; the first is what Baton depends on.
    from nixl_cu13._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle

_LOCAL_SIDE = "NIXL_INIT_AGENT"
_Indices = np.ndarray[tuple[int], np.dtype[np.int32]]


class _GuardedAgent:
    """An agent of which every use is asked for, the ones between two others too: each may make the network progress."""

    def __init__(self, agent: nixl_agent, guard: Callable[[], None]) -> None:
        self._agent = agent
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        self._guard()
        return getattr(self._agent, name)

    def release(self, handle: Any) -> None:
        """Give a handle of the agent's back; where a peer is lost it may have gone with it."""
        self._guard()
        with contextlib.suppress(Exception):
            handle.release()


@dataclass(frozen=True)
class _Side:
    """A worker's memory, ready to be written from or to.

    Attributes:
        info: the worker.
        groups: by cache group, a descriptor for every (layer, block), layer-major.
        pieces: a descriptor for every piece of its probe memory.
    """

    info: EngineInfo
    groups: tuple[nixl_prepped_dlist_handle, ...]
    pieces: nixl_prepped_dlist_handle

    def release(self, agent: _GuardedAgent) -> None:
        for handle in (*self.groups, self.pieces):
            agent.release(handle)


class NixlEndpoint:
    """One agent: its connections live and die with it, and nothing reaches the memory through it once it is closed.

    Descriptors are prepared once: a list for each cache group, with one for every (layer, block). NIXL joins those of a
    transfer that are neighbours on both sides when it makes the transfer, at 4 ns each, so blocks that lie together
    travel as one.

    Args:
        info: the worker, with the endpoint's name; what peers need to know is `self.info`.
        memory: to register: the cache groups and the probe memory.
        guard: called before every use of the agent; what it raises is not caught.
        count_descriptors: have every transfer say how many descriptors it became.
    """

    def __init__(
        self, info: EngineInfo, memory: Sequence[torch.Tensor], guard: Callable[[], None], *, count_descriptors: bool
    ) -> None:
        self._count_descriptors = count_descriptors
        self._guard = guard
        guard()
        config = nixl_agent_config(enable_prog_thread=False, capture_telemetry=count_descriptors)
        self._agent: Any = _GuardedAgent(nixl_agent(info.endpoint, config), guard)
        self._registrations = [self._agent.register_memory(tensor) for tensor in memory]
        self.info = replace(info, metadata=self._agent.get_agent_metadata())
        self._own = self._prepare(_LOCAL_SIDE, info)
        self._peers: dict[str, _Side] = {}
        self.broken: set[str] = set()
        """Peers to whom something has failed since they were added."""
        self._transfers: weakref.WeakSet[NixlTransfer] = weakref.WeakSet()

    def _prepare(self, agent_name: str, info: EngineInfo) -> _Side:
        """Descriptors of a worker's memory, each list given as one strided row."""

        def prepare(address: int, size: int, count: int) -> nixl_prepped_dlist_handle:
            row = np.array([[address, size, info.device_index, size, count]], dtype=np.uint64)
            return self._agent.prep_xfer_dlist(agent_name, row, "VRAM" if info.device_type == "cuda" else "DRAM")

        return _Side(
            info,
            tuple(prepare(r.address, r.block_bytes, r.num_layers * r.num_blocks) for r in info.regions),
            prepare(info.probe_address, PROBE_PIECE_BYTES, PROBE_PIECES),
        )

    def peer_endpoint(self, engine_id: str) -> str | None:
        """Where a peer is reached; None: it was not added."""
        side = self._peers.get(engine_id)
        return side.info.endpoint if side is not None else None

    def add(self, peer: EngineInfo) -> None:
        """Make a peer reachable.

        Raises:
            PeerError: it cannot be.
        """
        try:
            self._agent.add_remote_agent(peer.metadata)
            self._peers[peer.engine_id] = self._prepare(peer.endpoint, peer)
        except Exception as error:  # NIXL's exception types share no base
            raise PeerError(f"NIXL cannot reach {peer.engine_id}: {error}") from error

    def remove(self, engine_id: str) -> None:
        """Forget a peer; what is in flight goes on."""
        self.broken.discard(engine_id)
        side = self._peers.pop(engine_id, None)
        if side is not None:
            side.release(self._agent)
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(side.info.endpoint)

    def blocks(
        self,
        operation: str,
        peer: str,
        group: int,
        layers: range,
        own_blocks: Sequence[int],
        peer_blocks: Sequence[int],
        message: bytes,
    ) -> NixlTransfer:
        """Start a WRITE to a peer's blocks, or a READ of them.

        Raises:
            NotConnectedError: the peer is unknown.
            PeerError: it cannot be started, or one of the two does not have such a block.
        """
        other = self._side(peer)
        num_own, num_other = (side.info.regions[group].num_blocks for side in (self._own, other))
        check_blocks(own_blocks, num_own, self.info.engine_id)
        check_blocks(peer_blocks, num_other, peer)
        own_indices, peer_indices = _indices(layers, own_blocks, num_own), _indices(layers, peer_blocks, num_other)
        lists = (self._own.groups[group], own_indices, other.groups[group], peer_indices)
        return self._start(operation, peer, *lists, message)

    def pieces(self, peer: str, pieces: range, message: bytes) -> NixlTransfer:
        """Start a WRITE of pieces of the probe memory; raises as `blocks` does."""
        indices = np.asarray(pieces, dtype=np.int32)
        return self._start("WRITE", peer, self._own.pieces, indices, self._side(peer).pieces, indices, message)

    def _side(self, peer: str) -> _Side:
        if (side := self._peers.get(peer)) is None:
            raise NotConnectedError(f"{peer} is not connected")
        return side

    def _start(
        self,
        operation: str,
        peer: str,
        own: nixl_prepped_dlist_handle,
        own_indices: _Indices,
        other: nixl_prepped_dlist_handle,
        other_indices: _Indices,
        message: bytes,
    ) -> NixlTransfer:
        agent = self._agent
        try:
            handle = agent.make_prepped_xfer(operation, own, own_indices, other, other_indices, message)
            state = STATES[agent.transfer(handle)]
        except Exception as error:
            self.broken.add(peer)
            raise PeerError(f"{operation} with {peer} failed: {error}") from error
        transfer = NixlTransfer(
            agent, handle, state, partial(self.broken.add, peer), count_descriptors=self._count_descriptors
        )
        self._transfers.add(transfer)
        return transfer

    def send(self, peer: str, message: bytes) -> None:
        """Send a message; raises as `blocks` does."""
        endpoint = self._side(peer).info.endpoint
        try:
            self._agent.send_notif(endpoint, message)
        except Exception as error:
            self.broken.add(peer)
            raise PeerError(f"sending to {peer} failed: {error}") from error

    def receive(self) -> dict[str, list[bytes]]:
        """Messages that have arrived, by the endpoint of the sender. Also makes the network progress."""
        arrived: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return arrived

    def close(self) -> None:
        """End every connection; transfers in flight fail, and nothing more is read, written or received here."""
        for transfer in list(self._transfers):
            transfer.abandon()
        for side in self._peers.values():
            side.release(self._agent)
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(side.info.endpoint)
        self._own.release(self._agent)
        for registration in self._registrations:
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(registration)
        # The agent ends with the last reference to it, and its sockets with the agent.
        self._guard()
        del self._agent, self._own, self._peers, self._registrations


def _indices(layers: range, blocks: Sequence[int], num_blocks: int) -> _Indices:
    """Descriptor numbers of these blocks in these layers, layer-major."""
    starts = np.asarray(layers, dtype=np.int32)[:, None] * num_blocks
    return (starts + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)
