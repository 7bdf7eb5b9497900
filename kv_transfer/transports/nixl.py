"""The NIXL agent as a transport: the only file that imports NIXL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kv_transfer.errors import PeerError
from kv_transfer.layout import KVLayout
from kv_transfer.region import regions_of
from kv_transfer.transports.base import (
    PROBE_PIECE_BYTES,
    PROBE_PIECES,
    EngineInfo,
    Transfer,
    TransferState,
    Transport,
)

try:
    from nixl._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle
except ModuleNotFoundError:
    # The package `nixl` only picks one of nixl_cu13 and nixl_cu12; the first is what Baton depends on.
    from nixl_cu13._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle

_LOCAL_SIDE = "NIXL_INIT_AGENT"
_STATES = {"DONE": TransferState.DONE, "PROC": TransferState.IN_FLIGHT, "ERR": TransferState.FAILED}


@dataclass(frozen=True)
class _Side:
    """A worker's memory, ready to be written from or to.

    Attributes:
        info: the worker.
        groups: by cache group, a descriptor for every (layer, block), layer-major.
        pieces: a descriptor for every piece of its rehearsal memory.
    """

    info: EngineInfo
    groups: tuple[nixl_prepped_dlist_handle, ...]
    pieces: nixl_prepped_dlist_handle


class NixlTransport(Transport):
    """WRITEs over NIXL's UCX backend (NVLink, RDMA, shared memory or TCP, whichever UCX finds best).

    No progress thread: it would burn a core. The owner's calls to `receive` and `Transfer.state` make progress.

    Descriptors are prepared once: a list for each cache group, with one for every (layer, block). NIXL joins those of a
    transfer that are neighbours on both sides when it makes the transfer, at 4 ns each, so blocks that lie together
    travel as one.

    Args:
        count_descriptors: have every transfer say how many descriptors it became.
        may_write: asked before every WRITE; where it says no, the WRITE fails.
    """

    def __init__(self, *, count_descriptors: bool = False, may_write: Callable[[], bool] = lambda: True) -> None:
        self._count_descriptors = count_descriptors
        self._may_write = may_write
        self._agent: nixl_agent | None = None
        self._registrations: list[object] = []
        self._probe_memory: torch.Tensor | None = None
        self._own: _Side | None = None
        self._peers: dict[str, _Side] = {}

    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        """See `Transport.register`. Afterwards the calling thread has the cache's device as its current one."""
        regions, device = regions_of(kv_caches, layout), kv_caches[0].device
        if device.type == "cuda":  # without a CUDA context on this thread UCX silently drops NVLink
            torch.cuda.set_device(device)
            torch.cuda.synchronize(device)
        agent = nixl_agent(
            engine_id, nixl_agent_config(enable_prog_thread=False, capture_telemetry=self._count_descriptors)
        )
        self._agent = agent
        self._probe_memory = torch.empty(PROBE_PIECES * PROBE_PIECE_BYTES, dtype=torch.uint8, device=device)
        self._registrations = [agent.register_memory(memory) for memory in (*kv_caches, self._probe_memory)]
        info = EngineInfo(
            engine_id=engine_id,
            incarnation=incarnation,
            layout=layout,
            regions=regions,
            device_type=device.type,
            device_index=device.index or 0,
            metadata=agent.get_agent_metadata(),
            probe_address=self._probe_memory.data_ptr(),
        )
        self._own = self._prepare(_LOCAL_SIDE, info)
        return info

    def _prepare(self, agent_name: str, info: EngineInfo) -> _Side:
        """Descriptors of a worker's memory, each list given as one strided row."""

        def prepare(address: int, size: int, count: int) -> nixl_prepped_dlist_handle:
            row = np.array([[address, size, info.device_index, size, count]], dtype=np.uint64)
            return self._started.prep_xfer_dlist(agent_name, row, _mem_type(info))

        return _Side(
            info,
            tuple(prepare(r.address, r.block_bytes, r.num_layers * r.num_blocks) for r in info.regions),
            prepare(info.probe_address, PROBE_PIECE_BYTES, PROBE_PIECES),
        )

    @property
    def _started(self) -> nixl_agent:
        if self._agent is None:
            raise PeerError("the NIXL agent has no registered memory yet")
        return self._agent

    def add_peer(self, peer: EngineInfo) -> None:
        """See `Transport.add_peer`."""
        if peer.engine_id in self._peers:
            return
        try:
            self._started.add_remote_agent(peer.metadata)
            self._peers[peer.engine_id] = self._prepare(peer.engine_id, peer)
        except Exception as error:  # NIXL's exception types share no base
            raise PeerError(f"NIXL cannot reach {peer.engine_id}: {error}") from error

    def remove_peer(self, engine_id: str) -> None:
        """See `Transport.remove_peer`."""
        side = self._peers.pop(engine_id, None)
        if side is None:
            return
        for handle in (*side.groups, side.pieces):
            with contextlib.suppress(Exception):  # a lost peer may have taken its half with it
                handle.release()
        with contextlib.suppress(Exception):
            self._started.remove_remote_agent(engine_id)

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
        own, other = self._sides(peer)
        src = _indices(layers, src_blocks, own.info.regions[group].num_blocks)
        dst = _indices(layers, dst_blocks, other.info.regions[group].num_blocks)
        return self._start("WRITE", own.groups[group], src, other, other.groups[group], dst, message)

    def read(
        self, peer: str, group: int, layers: range, src_blocks: Sequence[int], dst_blocks: Sequence[int]
    ) -> Transfer:
        """Start reading a peer's blocks into one's own; handoffs never do, see `docs/design.md`.

        Raises:
            PeerError: the peer is unknown or gone.
        """
        own, other = self._sides(peer)
        src = _indices(layers, src_blocks, other.info.regions[group].num_blocks)
        dst = _indices(layers, dst_blocks, own.info.regions[group].num_blocks)
        return self._start("READ", own.groups[group], dst, other, other.groups[group], src, b"")

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        """See `Transport.probe_bandwidth`."""
        own, other = self._sides(peer)
        indices = np.asarray(pieces, dtype=np.int32)
        return self._start("WRITE", own.pieces, indices, other, other.pieces, indices, message)

    def _sides(self, peer: str) -> tuple[_Side, _Side]:
        other = self._peers.get(peer)
        if other is None or self._own is None:
            raise PeerError(f"{peer} is not connected")
        return self._own, other

    def _start(
        self,
        operation: str,
        own: nixl_prepped_dlist_handle,
        own_indices: _Indices,
        peer: _Side,
        other: nixl_prepped_dlist_handle,
        other_indices: _Indices,
        message: bytes,
    ) -> NixlTransfer:
        agent = self._started
        try:
            handle = agent.make_prepped_xfer(operation, own, own_indices, other, other_indices, message)
            if not self._may_write():
                handle.release()
                raise PeerError("this worker has not been heard for so long that others may use that memory")
            state = _STATES[agent.transfer(handle)]
        except Exception as error:
            raise PeerError(f"{operation} with {peer.info.engine_id} failed: {error}") from error
        return NixlTransfer(agent, handle, state, count_descriptors=self._count_descriptors)

    def send(self, peer: str, message: bytes) -> None:
        """See `Transport.send`."""
        if peer not in self._peers:
            raise PeerError(f"{peer} is not connected")
        try:
            self._started.send_notif(peer, message)
        except Exception as error:
            raise PeerError(f"sending to {peer} failed: {error}") from error

    def receive(self) -> list[tuple[str, bytes]]:
        """See `Transport.receive`."""
        arrived = self._started.get_new_notifs()
        return [(peer, message) for peer, messages in arrived.items() for message in messages]

    def close(self) -> None:
        """See `Transport.close`."""
        if self._agent is None:
            return
        for engine_id in list(self._peers):
            self.remove_peer(engine_id)
        with contextlib.suppress(Exception):
            if self._own is not None:
                for handle in (*self._own.groups, self._own.pieces):
                    handle.release()
            for registration in self._registrations:
                self._agent.deregister_memory(registration)
        self._agent = None


_Indices = np.ndarray[tuple[int], np.dtype[np.int32]]


def _mem_type(info: EngineInfo) -> str:
    return "VRAM" if info.device_type == "cuda" else "DRAM"


def _indices(layers: range, blocks: Sequence[int], num_blocks: int) -> _Indices:
    """Descriptor numbers of these blocks in these layers, layer-major."""
    starts = np.arange(layers.start, layers.stop, dtype=np.int32)[:, None] * num_blocks
    return (starts + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)


class NixlTransfer(Transfer):
    """A transfer of NIXL's.

    Attributes:
        num_descriptors: that it became, once it has ended; 0 when nobody counts.
    """

    def __init__(
        self, agent: nixl_agent, handle: nixl_xfer_handle, state: TransferState, *, count_descriptors: bool
    ) -> None:
        self.num_descriptors = 0
        self._agent = agent
        self._handle = handle
        self._state = state
        self._count = count_descriptors
        if state is not TransferState.IN_FLIGHT:
            self._release()

    def state(self) -> TransferState:
        """See `Transfer.state`."""
        if self._state is TransferState.IN_FLIGHT:
            try:
                self._state = _STATES[self._agent.check_xfer_state(self._handle)]
            except Exception:  # nixlRemoteDisconnectError and its like: the peer is gone, so the transfer has ended
                self._state = TransferState.FAILED
            if self._state is not TransferState.IN_FLIGHT:
                self._release()
        return self._state

    def _release(self) -> None:
        with contextlib.suppress(Exception):
            if self._count:
                self.num_descriptors = int(self._agent.get_xfer_telemetry(self._handle).descCount)
        with contextlib.suppress(Exception):
            self._handle.release()
