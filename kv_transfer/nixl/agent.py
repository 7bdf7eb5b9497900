"""The NIXL agent as a transport: the only file that imports NIXL."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from kv_transfer.errors import PeerError
from kv_transfer.layout import KVLayout
from kv_transfer.transport import EngineInfo, Transfer, TransferState, Transport

try:
    from nixl._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle
except ModuleNotFoundError:
    # The package `nixl` only picks one of nixl_cu13 and nixl_cu12; the first is what Baton depends on.
    from nixl_cu13._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle

_LOCAL_SIDE = "NIXL_INIT_AGENT"
_STATES = {"DONE": TransferState.DONE, "PROC": TransferState.IN_FLIGHT, "ERR": TransferState.FAILED}


class NixlTransport(Transport):
    """WRITEs over NIXL's UCX backend (NVLink, RDMA, shared memory or TCP, whichever UCX finds best).

    No progress thread: it would burn a core. The owner's calls to `receive` and `Transfer.state` make progress.
    """

    def __init__(self) -> None:
        self._agent: nixl_agent | None = None
        self._registration: object = None
        self._local: nixl_prepped_dlist_handle | None = None
        self._remote: dict[str, nixl_prepped_dlist_handle] = {}
        self._blocks: dict[str, int] = {}
        self._own_id = ""

    def register(self, engine_id: str, incarnation: int, kv_cache: torch.Tensor, layout: KVLayout) -> EngineInfo:
        """See `Transport.register`."""
        if kv_cache.is_cuda:  # without a CUDA context on this thread UCX silently drops NVLink
            torch.cuda.set_device(kv_cache.device)
            torch.cuda.synchronize(kv_cache.device)
        self._agent = nixl_agent(engine_id, nixl_agent_config(enable_prog_thread=False))
        self._registration = self._agent.register_memory(kv_cache)
        info = EngineInfo(
            engine_id=engine_id,
            incarnation=incarnation,
            layout=layout,
            num_blocks=kv_cache.shape[1],
            address=kv_cache.data_ptr(),
            device_type=kv_cache.device.type,
            device_index=kv_cache.device.index or 0,
            metadata=self._agent.get_agent_metadata(),
        )
        self._local = self._prepare(_LOCAL_SIDE, info)
        self._blocks[engine_id] = info.num_blocks
        self._own_id = engine_id
        return info

    def _prepare(self, agent_name: str, info: EngineInfo) -> nixl_prepped_dlist_handle:
        """Descriptors of every (layer, block) of a cache, layer-major, given as one dense strided row."""
        size = info.layout.block_bytes
        row = [info.address, size, info.device_index, size, info.layout.num_layers * info.num_blocks]
        mem_type = "VRAM" if info.device_type == "cuda" else "DRAM"
        return self._started.prep_xfer_dlist(agent_name, np.array([row], dtype=np.uint64), mem_type)

    @property
    def _started(self) -> nixl_agent:
        if self._agent is None:
            raise PeerError("the NIXL agent has no registered memory yet")
        return self._agent

    def add_peer(self, peer: EngineInfo) -> None:
        """See `Transport.add_peer`."""
        if peer.engine_id in self._remote:
            return
        try:
            self._started.add_remote_agent(peer.metadata)
            self._remote[peer.engine_id] = self._prepare(peer.engine_id, peer)
        except Exception as error:  # NIXL's exception types share no base
            raise PeerError(f"NIXL cannot reach {peer.engine_id}: {error}") from error
        self._blocks[peer.engine_id] = peer.num_blocks

    def remove_peer(self, engine_id: str) -> None:
        """See `Transport.remove_peer`."""
        handle = self._remote.pop(engine_id, None)
        self._blocks.pop(engine_id, None)
        if handle is None:
            return
        with contextlib.suppress(Exception):  # a lost peer may have taken its half with it
            handle.release()
        with contextlib.suppress(Exception):
            self._started.remove_remote_agent(engine_id)

    def write(
        self, peer: str, layers: range, src_blocks: Sequence[int], dst_blocks: Sequence[int], message: bytes
    ) -> Transfer:
        """See `Transport.write`."""
        remote = self._remote.get(peer)
        if remote is None or self._local is None:
            raise PeerError(f"{peer} is not connected")
        src = _indices(layers, src_blocks, self._blocks[self._own_id])
        dst = _indices(layers, dst_blocks, self._blocks[peer])
        agent = self._started
        try:
            handle = agent.make_prepped_xfer("WRITE", self._local, src, remote, dst, message)
            state = _STATES[agent.transfer(handle)]
        except Exception as error:
            raise PeerError(f"writing to {peer} failed: {error}") from error
        return _NixlTransfer(agent, handle, state)

    def send(self, peer: str, message: bytes) -> None:
        """See `Transport.send`."""
        if peer not in self._remote:
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
        for engine_id in list(self._remote):
            self.remove_peer(engine_id)
        with contextlib.suppress(Exception):
            if self._local is not None:
                self._local.release()
            self._agent.deregister_memory(self._registration)
        self._agent = None


def _indices(layers: range, blocks: Sequence[int], num_blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Descriptor numbers of these blocks in these layers, layer-major."""
    starts = np.arange(layers.start, layers.stop, dtype=np.int32)[:, None] * num_blocks
    return (starts + np.asarray(blocks, dtype=np.int32)[None, :]).reshape(-1)


class _NixlTransfer(Transfer):
    def __init__(self, agent: nixl_agent, handle: nixl_xfer_handle, state: TransferState) -> None:
        self._agent = agent
        self._handle = handle
        self._state = state
        if state is not TransferState.IN_FLIGHT:
            self._release()

    def state(self) -> TransferState:
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
            self._handle.release()
