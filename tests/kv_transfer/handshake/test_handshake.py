"""Two connectors meet, and what may go wrong then; and WRITEs that wait for the GPU hold nobody up."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from kv_transfer.connector import HandoffReceived
from kv_transfer.errors import PeerError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Hello
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.handshake import bandwidth_probe, handshake
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.base import PROBE_PIECE_BYTES, EngineInfo, Transfer, TransferState
from kv_transfer.transports.local import LocalFabric, LocalTransport

LAYOUT = KVLayout((GroupLayout("full", tuple(range(2)), 1, 1, 1, "float32"),))
CACHE = torch.zeros(2, 8, 2, 1, 1, 1)


def register(connector: PushConnector, name: str) -> EngineInfo:
    return connector.register_kv_caches(name, [torch.zeros(2, 8, 2, 1, 1, 1)], LAYOUT)


def start(*both: tuple[PushConnector, EngineInfo]) -> None:
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

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        return Failing()


def test_a_path_that_carries_no_data_is_refused_from_either_side():
    fabric = LocalFabric()
    broken = PushConnector(BrokenTransport(fabric), threaded=True)
    whole = LocalConnector(fabric, threaded=True)
    broken_info, whole_info = register(broken, "b"), register(whole, "w")
    start((broken, broken_info), (whole, whole_info))
    with pytest.raises(PeerError, match=f"a transfer to {whole_info.engine_id} failed"):
        broken.probe(whole_info.engine_id, 5.0)
    with pytest.raises(PeerError, match=r"was not met within 0\.2 s: still waiting for its answer"):
        whole.probe(broken_info.engine_id, 0.2)
    for connector in (broken, whole):
        connector.close()


def test_whoever_is_lost_while_being_met_is_reported_at_once():
    fabric = LocalFabric()
    asking, silent = Forgetful(fabric, 0), LocalConnector(fabric)
    connector = PushConnector(asking, threaded=True)
    info, silent_info = register(connector, "a"), register(silent, "s")
    start((connector, info), (silent, silent_info))
    failures: list[PeerError] = []

    def probe() -> None:
        with pytest.raises(PeerError) as caught:
            connector.probe(silent_info.engine_id, 60.0)
        failures.append(caught.value)

    thread = threading.Thread(target=probe)
    thread.start()
    while not asking.num_sent:
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
    start((p, p_info), (d, d_info))
    events = {handoff: [Event(), Event()] for handoff in (b"a" * 16, b"b" * 16)}
    keys = {}
    for number, (handoff, (first, second)) in enumerate(events.items()):
        if grant_first:
            keys[handoff] = d.expect(handoff, p_info.engine_id, [GroupBlocks(0, [number])])
        p.begin(handoff, d_info.engine_id)
        p.push(handoff, 0, range(1), 0, [number], first)
        p.push(handoff, 0, range(1, 2), 0, [number], second)
        p.finish(handoff, 5)
        if not grant_first:
            keys[handoff] = d.expect(handoff, p_info.engine_id, [GroupBlocks(0, [number])])
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


class Forgetful(LocalTransport):
    """Loses the first messages that it is to send, as a connection that is being made may."""

    def __init__(self, fabric: LocalFabric, lost: int) -> None:
        super().__init__(fabric)
        self.lost = lost
        self.num_sent = 0

    def send(self, peer: str, message: bytes) -> None:
        self.num_sent += 1
        if self.num_sent > self.lost:
            super().send(peer, message)


@pytest.mark.parametrize(("lost_questions", "lost_answers"), [(2, 0), (0, 2), (1, 1)])
def test_two_meet_although_first_messages_get_lost(lost_questions, lost_answers, monkeypatch):
    monkeypatch.setattr(handshake, "ASK_AGAIN_S", 0.02)
    fabric = LocalFabric()
    asking, answering = Forgetful(fabric, lost_questions), Forgetful(fabric, lost_answers)
    one, other = PushConnector(asking, threaded=True), PushConnector(answering, threaded=True)
    one_info, other_info = register(one, "a"), register(other, "b")
    start((one, one_info), (other, other_info))
    assert one.probe(other_info.engine_id, 30.0) < 30.0
    assert one.link_to(other_info.engine_id) is not None
    assert other.link_to(one_info.engine_id) is not None
    for connector in (one, other):
        connector.close()


def test_who_is_asked_again_while_it_gets_ready_answers_once():
    fabric = LocalFabric()
    answering = Forgetful(fabric, 0)
    asking_info, info = register(LocalConnector(fabric), "a"), answering.register("b", 2, [CACHE], LAYOUT)
    answering.add_peer(asking_info)
    answers = handshake.Handshakes(answering, info.incarnation)
    question = Hello(HandoffKey(b"q" * 16, asking_info.incarnation, 0), reply=False)
    for _ in range(5):
        answers.on_hello(asking_info.engine_id, question)
    while answers.active:
        answers.progress()
    assert answering.num_sent == 1


class Clock:
    """Goes a microsecond forward whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now


class Arriving(Transfer):
    def __init__(self, clock: Clock, lands_at: float) -> None:
        self._clock, self._lands_at = clock, lands_at

    def state(self) -> TransferState:
        return TransferState.DONE if self._clock.now >= self._lands_at else TransferState.IN_FLIGHT


class SeenNowAndThen(LocalTransport):
    """Data moves at `rate`, and has landed when the peer looks next, every `look_s`."""

    def __init__(self, clock: Clock, rate: float, look_s: float) -> None:
        super().__init__(LocalFabric())
        self._clock, self._rate, self._look_s, self._moved_at = clock, rate, look_s, 0.0

    def probe_bandwidth(self, peer: str, pieces: range, message: bytes) -> Transfer:
        num_bytes = len(pieces) * PROBE_PIECE_BYTES
        self._clock.now += 5e-6
        self._moved_at = max(self._moved_at, self._clock.now) + num_bytes / self._rate
        return Arriving(self._clock, math.ceil(self._moved_at / self._look_s) * self._look_s)


def _result_of(steps):
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return ended.value


@pytest.mark.parametrize("rate", [1e9, 2.5e10, 3e11])
def test_how_fast_data_moves_is_not_how_often_the_peer_looks(rate, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bandwidth_probe, "time", clock)
    steps = bandwidth_probe.probe_bandwidth(SeenNowAndThen(clock, rate, 2.5e-4), "peer", b"")
    assert _result_of(steps).bytes_per_s == pytest.approx(rate, rel=0.25)


def test_who_has_heard_of_a_peer_looks_often_for_a_while(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(handshake, "time", clock)
    own = handshake.Handshakes(LocalTransport(LocalFabric()), 1)
    assert not own.active
    own.on_hello("peer", Hello(HandoffKey(b"k" * 16, 2, 0), reply=True))
    assert own.active
    clock.now += 1.0
    assert not own.active
