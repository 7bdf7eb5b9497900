"""Two connectors meet, and what may go wrong then; and WRITEs that wait for the GPU hold nobody up."""

from __future__ import annotations

import threading

import pytest
import torch

from kv_transfer.connector import HandoffReceived
from kv_transfer.errors import PeerError
from kv_transfer.layout import KVLayout
from kv_transfer.local import LocalConnector, LocalFabric, LocalTransport
from kv_transfer.push import PushConnector
from kv_transfer.transport import EngineInfo, Transfer, TransferState

LAYOUT = KVLayout("mha", 2, 1, 1, 1, "float32")


def register(connector: PushConnector, name: str) -> EngineInfo:
    return connector.register_kv_caches(name, torch.zeros(2, 8, 2, 1, 1, 1), LAYOUT)


def meet(*both: tuple[PushConnector, EngineInfo]) -> None:
    for connector, info in both:
        for _, other in both:
            if other is not info:
                connector.connect(other, 5.0)


def pump(*connectors: PushConnector, rounds: int = 20) -> list:
    return [event for _ in range(rounds) for connector in connectors for event in connector.poll()]


class Failing(Transfer):
    def state(self) -> TransferState:
        return TransferState.FAILED


class BrokenTransport(LocalTransport):
    """Messages arrive, data does not."""

    def rehearse(self, peer: str, pieces: range, message: bytes) -> Transfer:
        return Failing()


def test_a_path_that_carries_no_data_is_refused_from_either_side():
    fabric = LocalFabric()
    broken = PushConnector(BrokenTransport(fabric), threaded=True)
    whole = LocalConnector(fabric, threaded=True)
    broken_info, whole_info = register(broken, "b"), register(whole, "w")
    meet((broken, broken_info), (whole, whole_info))
    with pytest.raises(PeerError, match=f"a transfer to {whole_info.engine_id} failed"):
        broken.probe(whole_info.engine_id, 5.0)
    with pytest.raises(PeerError, match=r"was not met within 0\.2 s: still waiting for its answer"):
        whole.probe(broken_info.engine_id, 0.2)
    for connector in (broken, whole):
        connector.close()


def test_whoever_is_lost_while_being_met_is_reported_at_once():
    fabric = LocalFabric()
    connector, silent = LocalConnector(fabric, threaded=True), LocalConnector(fabric)
    info, silent_info = register(connector, "a"), register(silent, "s")
    meet((connector, info), (silent, silent_info))
    failures: list[PeerError] = []

    def probe() -> None:
        with pytest.raises(PeerError) as caught:
            connector.probe(silent_info.engine_id, 60.0)
        failures.append(caught.value)

    thread = threading.Thread(target=probe)
    thread.start()
    while not fabric._ends[silent_info.engine_id].arrivals:
        pass
    connector.disconnect(silent_info.engine_id)
    thread.join(30)
    assert [str(failure) for failure in failures] == [f"{silent_info.engine_id} is gone"]
    connector.close()


def test_an_unknown_peer_cannot_be_met():
    connector = LocalConnector(LocalFabric())
    register(connector, "a")
    with pytest.raises(PeerError, match="nobody is not connected"):
        connector.probe("nobody", 1.0)


class Event:
    happened = False

    def query(self) -> bool:
        return self.happened


@pytest.mark.parametrize("grant_first", [True, False])
def test_a_part_waits_for_its_event_and_holds_nobody_up(grant_first):
    fabric = LocalFabric()
    p, d = LocalConnector(fabric), LocalConnector(fabric)
    p_info, d_info = register(p, "p"), register(d, "d")
    meet((p, p_info), (d, d_info))
    events = {handoff: [Event(), Event()] for handoff in (b"a" * 16, b"b" * 16)}
    keys = {}
    for number, (handoff, (first, second)) in enumerate(events.items()):
        if grant_first:
            keys[handoff] = d.expect(handoff, p_info.engine_id, [number])
        p.begin(handoff, d_info.engine_id)
        p.push(handoff, range(1), 0, [number], first)
        p.push(handoff, range(1, 2), 0, [number], second)
        p.finish(handoff, 5)
        if not grant_first:
            keys[handoff] = d.expect(handoff, p_info.engine_id, [number])
    assert pump(p, d) == []
    for event in events[b"b" * 16]:
        event.happened = True
    assert [event for event in pump(p, d) if isinstance(event, HandoffReceived)] == [
        HandoffReceived(keys[b"b" * 16], 5)
    ]
    events[b"a" * 16][1].happened = True
    assert pump(p, d) == [], "parts keep their order"
    events[b"a" * 16][0].happened = True
    assert HandoffReceived(keys[b"a" * 16], 5) in pump(p, d)
