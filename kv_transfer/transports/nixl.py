"""NIXL as a transport: which endpoint leads to which peer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from kv_transfer.errors import NotConnectedError, PeerError
from kv_transfer.layout import KVLayout
from kv_transfer.process import ProcessId
from kv_transfer.region import regions_of
from kv_transfer.transports.base import (
    PROBE_PIECE_BYTES,
    PROBE_PIECES,
    EngineInfo,
    Transfer,
    Transport,
)
from kv_transfer.transports.nixl_endpoint import NixlEndpoint

_SEPARATOR = "#"


class NixlTransport(Transport):
    """WRITEs over NIXL's UCX backend (NVLink, RDMA, shared memory or TCP, whichever UCX finds best).

    No progress thread: it would burn a core. The owner's calls to `receive` and `Transfer.state` make progress.

    One agent is shared by the peers that were added without more ado; `new_endpoint` makes one for a peer alone, which
    costs some 30 ms, 5 MB and 3 µs a look.

    Args:
        count_descriptors: have every transfer say how many descriptors it became.
        guard: called before every use of NIXL, see `kv_transfer.lease.lease_guard`.
        process: as which it is known to peers; None: the calling one.
    """

    def __init__(
        self,
        *,
        count_descriptors: bool = False,
        guard: Callable[[], None] = lambda: None,
        process: ProcessId | None = None,
    ) -> None:
        self._count_descriptors = count_descriptors
        self._guard = guard
        self._process = process or ProcessId.own()
        self._memory: list[torch.Tensor] = []
        self._info: EngineInfo | None = None
        self._shared: NixlEndpoint | None = None
        self._private: dict[str, NixlEndpoint] = {}
        self._numbers = itertools.count(1)
        self._peers: dict[str, NixlEndpoint] = {}
        self._processes: dict[str, ProcessId | None] = {}
        self._reached_shared: set[str] = set()  # peers who have had a connection to the endpoint that stays

    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        """See `Transport.register`. Afterwards the calling thread has the cache's device as its current one."""
        regions, device = regions_of(kv_caches, layout), kv_caches[0].device
        if device.type == "cuda":  # without a CUDA context on this thread UCX silently drops NVLink
            torch.cuda.set_device(device)
            torch.cuda.synchronize(device)
        probe_memory = torch.empty(PROBE_PIECES * PROBE_PIECE_BYTES, dtype=torch.uint8, device=device)
        self._memory = [*kv_caches, probe_memory]
        info = EngineInfo(
            engine_id=engine_id,
            incarnation=incarnation,
            layout=layout,
            regions=regions,
            device_type=device.type,
            device_index=device.index or 0,
            metadata=b"",
            probe_address=probe_memory.data_ptr(),
            endpoint=engine_id,
            process=self._process,
        )
        self._shared = self._open(info)
        self._info = self._shared.info
        return self._info

    def _open(self, info: EngineInfo) -> NixlEndpoint:
        return NixlEndpoint(info, self._memory, self._guard, count_descriptors=self._count_descriptors)

    def new_endpoint(self, engine_id: str) -> EngineInfo:
        """See `Transport.new_endpoint`."""
        if self._info is None:
            raise PeerError("the NIXL agent has no registered memory yet")
        self._disconnect(engine_id)
        name = f"{self._info.engine_id}{_SEPARATOR}{next(self._numbers)}"
        endpoint = self._private[engine_id] = self._open(replace(self._info, endpoint=name))
        return endpoint.info

    def add_peer(self, peer: EngineInfo) -> None:
        """See `Transport.add_peer`."""
        endpoint = self._private.get(peer.engine_id, self._shared)
        if endpoint is None:
            raise PeerError("the NIXL agent has no registered memory yet")
        known = self._peers.get(peer.engine_id)
        if known is endpoint and endpoint.peer_endpoint(peer.engine_id) == peer.endpoint:
            return
        if known is not None:
            known.remove(peer.engine_id)
        endpoint.add(peer)
        self._peers[peer.engine_id] = endpoint
        self._processes[peer.engine_id] = peer.process

    def remove_peer(self, engine_id: str) -> None:
        """See `Transport.remove_peer`."""
        self._disconnect(engine_id)

    def _disconnect(self, engine_id: str) -> None:
        endpoint = self._peers.pop(engine_id, None)
        if endpoint is not None:
            endpoint.remove(engine_id)
        if endpoint is not None and endpoint is self._shared:
            self._reached_shared.add(engine_id)
        private = self._private.pop(engine_id, None)
        if private is not None:
            private.close()

    def may_land(self, engine_id: str, confirmed_dead: bool) -> bool:
        """See `Transport.may_land`."""
        process = self._processes.get(engine_id)
        runs = process.may_run(self._process) if process is not None else None
        if runs is None:
            same_host = process is None or process.host == self._process.host
            runs = not confirmed_dead and (same_host or engine_id in self._reached_shared)
        if not runs:
            self._processes.pop(engine_id, None)
            self._reached_shared.discard(engine_id)
        return runs

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """See `Transport.broken_peers`."""
        return {
            peer: endpoint.peer_endpoint(peer) or ""
            for endpoint in tuple(self._endpoints)
            for peer in tuple(endpoint.broken)
        }

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
        return self._to(peer).blocks("WRITE", peer, group, layers, src_blocks, dst_blocks, message)

    def read(
        self, peer: str, group: int, layers: range, src_blocks: Sequence[int], dst_blocks: Sequence[int]
    ) -> Transfer:
        """Start reading a peer's blocks into one's own; handoffs never do, see `docs/design.md`.

        Raises:
            PeerError: the peer is unknown or gone.
        """
        return self._to(peer).blocks("READ", peer, group, layers, dst_blocks, src_blocks, b"")

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        """See `Transport.probe_bandwidth`."""
        return self._to(peer).pieces(peer, pieces, message)

    def send(self, peer: str, message: bytes) -> None:
        """See `Transport.send`."""
        self._to(peer).send(peer, message)

    def _to(self, peer: str) -> NixlEndpoint:
        if (endpoint := self._peers.get(peer)) is None:
            raise NotConnectedError(f"{peer} is not connected")
        return endpoint

    @property
    def _endpoints(self) -> list[NixlEndpoint]:
        return [*([self._shared] if self._shared is not None else []), *self._private.values()]

    def receive(self) -> list[tuple[str, bytes]]:
        """See `Transport.receive`."""
        return [
            (name.partition(_SEPARATOR)[0], message)
            for endpoint in self._endpoints
            for name, messages in endpoint.receive().items()
            for message in messages
        ]

    def close(self) -> None:
        """See `Transport.close`."""
        for endpoint in self._endpoints:
            endpoint.close()
        self._shared, self._private, self._peers = None, {}, {}
