"""Holds a worker up at a moment of a handoff, until whoever waits for that moment has done what it wanted there.

A moment that lasts a millisecond cannot be hit from outside. So workers of a service that is to be hurt look at a gate
when a handoff reaches it: a folder, in which a file with the moment's name stands for the wish that the next one to
come there waits. Files are all that there is between the two, because either may be killed or frozen.
"""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.ray import actors
from cluster.ray.actors import FollowerActor, WorkerActor
from kv_transfer.connector import ConnectorEvent, HandoffReceived, ReadyEvent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.layout import KVLayout
from kv_transfer.nixl_connector import NixlConnector
from kv_transfer.transports.base import EngineInfo
from workers.config import WorkerConfig

FOLDER = "BATON_FAULT_GATE"
"""Names the folder in the environment of workers."""
PORTS = "BATON_FAULT_PORTS"
"""There, the ports of each worker whose successor is to have them again: JSON, first and last by name."""
_REACHED, _CLAIMED, _OPEN = "reached.json", "claimed", "open"
_PATIENCE_S = 60.0
_LOOK_INTERVAL_S = 0.001
_REMEMBERED = 1024
_MID = 2
"""Pushes of a handoff before the one at which it is in its midst."""


class Gate:
    """Both sides of it.

    Args:
        folder: where its files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def arm(self, phase: str, engines: Sequence[str] = ()) -> None:
        """Have the next handoff that reaches this moment wait; with `engines`, the next one of any of these."""
        for name in (_REACHED, _CLAIMED, _OPEN):
            (self._folder / name).unlink(missing_ok=True)
        half_written = self._folder / f"{phase}.part"
        half_written.write_text(json.dumps(list(engines)))
        half_written.rename(self._folder / phase)

    def reached(self) -> dict[str, str] | None:
        """Who waits: the handoff's engines, by role; None: nobody yet."""
        try:
            who: dict[str, str] = json.loads((self._folder / _REACHED).read_text())
        except FileNotFoundError:
            return None
        return who

    def open(self) -> None:
        """Let it go on."""
        (self._folder / _OPEN).touch()

    def wait(self, phase: str, **engines: str) -> None:
        """The worker's side: go on at once, unless this moment is waited for; `engines` are those of the handoff."""
        try:
            wanted = json.loads((self._folder / phase).read_text())
            if wanted and not set(wanted).intersection(engines.values()):
                return
            (self._folder / phase).rename(self._folder / _CLAIMED)
        except OSError:  # nobody waits for it, or somebody else is at it
            return
        half_written = self._folder / f"{_REACHED}.part"
        half_written.write_text(json.dumps(engines))
        half_written.rename(self._folder / _REACHED)
        give_up_at = time.monotonic() + _PATIENCE_S
        while not (self._folder / _OPEN).exists() and time.monotonic() < give_up_at:
            time.sleep(_LOOK_INTERVAL_S)


class GatedConnector(NixlConnector):
    """The connector of production, at whose handoffs the gate stands. Arguments as there."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._gate = Gate(Path(os.environ[FOLDER]))
        self._peers: OrderedDict[bytes, str] = OrderedDict()
        self._pushes: OrderedDict[bytes, int] = OrderedDict()
        self._engine_id = ""

    def register_kv_caches(self, name: str, kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> EngineInfo:
        """See `KVConnector.register_kv_caches`."""
        info = super().register_kv_caches(name, kv_caches, layout)
        self._engine_id = info.engine_id
        return info

    def begin(self, handoff_id: bytes, decode_engine: str) -> None:
        """See `KVConnector.begin`."""
        self._note_peer(handoff_id, decode_engine)
        super().begin(handoff_id, decode_engine)

    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """See `KVConnector.push`."""
        pushes = self._pushes.get(handoff_id, 0)
        self._pushes[handoff_id] = pushes + 1
        _bound(self._pushes)
        if pushes == 0:
            self._wait("before", handoff_id)
        super().push(handoff_id, group, layers, first_block, src_blocks, ready)
        if pushes == _MID:
            self._wait("while", handoff_id)

    def expect(
        self,
        handoff_id: bytes,
        prefill_engine: str,
        blocks: Sequence[GroupBlocks],
        ready: ReadyEvent | None = None,
    ) -> HandoffKey:
        """See `KVConnector.expect`."""
        self._note_peer(handoff_id, prefill_engine)
        return super().expect(handoff_id, prefill_engine, blocks, ready)

    def poll(self) -> list[ConnectorEvent]:
        """See `KVConnector.poll`."""
        events = super().poll()
        for event in events:
            if isinstance(event, HandoffReceived):
                prefill = self._peers.get(event.key.handoff_id, "")
                self._gate.wait("after", prefill=prefill, decode=self._engine_id)
        return events

    def _wait(self, phase: str, handoff_id: bytes) -> None:
        self._gate.wait(phase, prefill=self._engine_id, decode=self._peers.get(handoff_id, ""))

    def _note_peer(self, handoff_id: bytes, engine_id: str) -> None:
        self._peers[handoff_id] = engine_id
        _bound(self._peers)


class GatedActor(WorkerActor):
    """The actor of production with that connector. Only leads of workers are held up."""

    def __init__(self, config: WorkerConfig) -> None:
        setattr(actors, NixlConnector.__name__, GatedConnector)  # this process has no other worker
        keep_ports(config.name)
        super().__init__(config)


class KeptFollower(FollowerActor):
    """The follower of production, which takes its predecessor's ports, too, if that is wanted."""

    def __init__(self, config: WorkerConfig) -> None:
        keep_ports(f"{config.name}-rank1")
        super().__init__(config)


def keep_ports(name: str) -> None:
    """Have NIXL listen in this process on few ports, always the same ones for a worker of this name, if that is wanted.

    They are one less than twice as many as the endpoints that a worker has, one of its own and one for each peer: its
    successor has at least one of them again.
    """
    ports = json.loads(os.environ.get(PORTS, "{}"))
    if name in ports:
        first, last = ports[name]
        os.environ["UCX_TCP_PORT_RANGE"] = f"{first}-{last}"


def _bound(table: OrderedDict[bytes, Any]) -> None:
    if len(table) > _REMEMBERED:
        table.popitem(last=False)
