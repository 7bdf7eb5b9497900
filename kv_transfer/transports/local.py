"""One engine's end of the network within one process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from kv_transfer.errors import NotConnectedError
from kv_transfer.layout import KVLayout
from kv_transfer.region import regions_of
from kv_transfer.transports.base import EngineInfo, Landed, Transfer, Transport
from kv_transfer.transports.local_fabric import Faults, LocalFabric

__all__ = ["Faults", "LocalFabric", "LocalTransport"]


class LocalTransport(Transport):
    """One engine's end of a `LocalFabric`."""

    def __init__(self, fabric: LocalFabric) -> None:
        self._fabric = fabric
        self._info: EngineInfo | None = None
        self._numbers = itertools.count(1)
        self._private: dict[str, str] = {}
        self._peers: dict[str, tuple[str, str]] = {}
        self._reached_shared: set[str] = set()  # peers who have had a connection to the endpoint that stays
        self._broken: set[str] = set()

    def register(
        self, engine_id: str, incarnation: int, kv_caches: Sequence[torch.Tensor], layout: KVLayout
    ) -> EngineInfo:
        """See `Transport.register`."""
        regions, device = regions_of(kv_caches, layout), kv_caches[0].device.type
        self._fabric.attach(engine_id, kv_caches)
        self._info = EngineInfo(engine_id, incarnation, layout, regions, device, 0, b"", endpoint=engine_id)
        return self._info

    def new_endpoint(self, engine_id: str) -> EngineInfo:
        """See `Transport.new_endpoint`."""
        self.remove_peer(engine_id)
        name = f"{self._own.engine_id}#{next(self._numbers)}"
        self._private[engine_id] = name
        self._fabric.open(name)
        return replace(self._own, endpoint=name)

    def add_peer(self, peer: EngineInfo) -> None:
        """See `Transport.add_peer`."""
        own = self._private.get(peer.engine_id, self._own.endpoint)
        self._peers[peer.engine_id] = (own, peer.endpoint)
        self._broken.discard(peer.engine_id)

    def remove_peer(self, engine_id: str) -> None:
        """See `Transport.remove_peer`."""
        own, _ = self._peers.pop(engine_id, ("", ""))
        if own == self._own.engine_id:
            self._reached_shared.add(engine_id)
        self._broken.discard(engine_id)
        if (private := self._private.pop(engine_id, None)) is not None:
            self._fabric.close(private)

    def may_land(self, engine_id: str, confirmed_dead: bool) -> bool:
        """See `Transport.may_land`."""
        if self._fabric.has_data(engine_id, self._own.engine_id):
            return True
        reaches = self._fabric.direct or engine_id in self._reached_shared
        return reaches and not confirmed_dead and self._fabric.runs(engine_id)

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """See `Transport.broken_peers`."""
        return {peer: self._peers.get(peer, ("", ""))[1] for peer in tuple(self._broken)}

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
        return self._fabric.write(*self._link(peer), group, layers, src_blocks, dst_blocks, message)

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        """Within one process nothing is dear the first time, and nothing is written."""
        self._link(peer)
        return Landed()

    def send(self, peer: str, message: bytes) -> None:
        """See `Transport.send`."""
        self._fabric.send(*self._link(peer), message)

    def receive(self) -> list[tuple[str, bytes]]:
        """See `Transport.receive`."""
        return self._fabric.receive(self._own.engine_id) if self._info is not None else []

    def close(self) -> None:
        """See `Transport.close`."""
        if self._info is not None:
            self._fabric.detach(self._info.engine_id)

    @property
    def _own(self) -> EngineInfo:
        if self._info is None:
            raise NotConnectedError("the transport has no registered memory yet")
        return self._info

    def _link(self, peer: str) -> tuple[str, str]:
        """The endpoints here and there."""
        if (link := self._peers.get(peer)) is None:
            raise NotConnectedError(f"{peer} is not connected")
        if self._fabric.is_broken(*link):
            self._broken.add(peer)
        return link
