"""Every entry into NIXL is asked for: any may go on with a WRITE that was posted before a process was frozen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.transports import nixl_endpoint
from kv_transfer.transports.base import TransferState
from kv_transfer.transports.nixl import NixlTransport

LAYOUT = KVLayout((GroupLayout("full", (0, 1), 1, 1, 1, "float32"),))


class Entries:
    """What was called of NIXL, and which of it without having been asked for."""

    def __init__(self) -> None:
        self.asked = False
        self.all: list[str] = []
        self.unasked: list[str] = []

    def guard(self) -> None:
        self.asked = True

    def enter(self, name: str) -> None:
        self.all.append(name)
        if not self.asked:
            self.unasked.append(name)
        self.asked = False


ENTRIES = Entries()


class Handle:
    def release(self) -> None:
        ENTRIES.enter("release")


class Agent:
    """NIXL's agent, whose transfers are under way until they are looked at."""

    def __init__(self, name: str, config: object) -> None:
        ENTRIES.enter("nixl_agent")

    def __del__(self) -> None:
        ENTRIES.enter("the end of the agent")

    def __getattr__(self, name: str) -> Any:
        answers = {
            "get_agent_metadata": b"metadata",
            "prep_xfer_dlist": Handle(),
            "make_prepped_xfer": Handle(),
            "transfer": "PROC",
            "check_xfer_state": "DONE",
            "get_new_notifs": {},
            "get_xfer_telemetry": SimpleNamespace(descCount=1),
        }

        def call(*args: object) -> object:
            ENTRIES.enter(name)
            return answers.get(name)

        return call


@pytest.fixture
def entries(monkeypatch) -> Entries:
    fresh = Entries()
    monkeypatch.setattr(nixl_endpoint, "nixl_agent", Agent)
    monkeypatch.setattr(nixl_endpoint, "nixl_agent_config", lambda **kwargs: None)
    monkeypatch.setitem(globals(), "ENTRIES", fresh)
    return fresh


def test_every_entry_is_asked_for(entries):
    transport, other = NixlTransport(guard=entries.guard, count_descriptors=True), NixlTransport(guard=entries.guard)
    transport.register("p", 1, [torch.zeros(2, 8, 2, 1, 1, 1)], LAYOUT)
    peer = other.register("d", 2, [torch.zeros(2, 8, 2, 1, 1, 1)], LAYOUT)
    for endpoint in range(2):
        transport.new_endpoint("d")
        transport.add_peer(peer)
        transfers = [transport.write("d", 0, range(2), [1, 2], [3, 4], b"m") for _ in range(2)]
        transfers.append(transport.probe_bandwidth("d", range(4), b"m"))
        assert transfers[0].state() is TransferState.DONE
        transport.send("d", b"m")
        transport.receive()
        if endpoint:
            transport.remove_peer("d")
    transport.add_peer(peer)
    transport.write("d", 0, range(2), [1], [3], b"m")
    transport.close()
    other.close()
    assert entries.unasked == []
    assert set(entries.all) == {
        *("nixl_agent", "register_memory", "get_agent_metadata", "prep_xfer_dlist", "add_remote_agent"),
        *("make_prepped_xfer", "transfer", "check_xfer_state", "get_xfer_telemetry", "send_notif", "get_new_notifs"),
        *("release", "remove_remote_agent", "deregister_memory", "the end of the agent"),
    }
