"""Endpoints of real NIXL: a broken connection is replaced, and closing one is a fence for what comes over a network."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReceived, HandoffReleased

pytestmark = pytest.mark.nixl

TCP = {"UCX_TLS": "tcp"}
ELSEWHERE = {**TCP, "NIXL_PEER_HOST": "another"}
HANDOFF = b"h" * 16


@pytest.fixture
def device() -> str:
    """Over TCP alone no GPU memory is reached."""
    return "cpu"


def meet(prefill, decode) -> tuple[str, str]:
    """As the gateway has two workers meet, for the first time or once more."""
    infos = prefill.info(), decode.info()
    mine, theirs = prefill.new_endpoint(infos[1]), decode.new_endpoint(infos[0])
    assert mine.endpoint != infos[0].endpoint
    prefill.connect(theirs)
    decode.connect(mine)
    assert prefill.probe(infos[1].engine_id) < 10
    return infos[0].engine_id, infos[1].engine_id


def hand_over(prefill, decode, ids, handoff_id: bytes, src, dst, number: int) -> None:
    key = decode.expect(handoff_id, ids[0], dst)
    prefill.hand_over(handoff_id, ids[1], src, number)
    assert decode.events(1) == [HandoffReceived(key, number)]
    assert len(prefill.events(1)) == 1
    assert decode.numbers(dst) == [float(number)]


def test_a_broken_connection_is_replaced_and_blocks_come_back(make_peer):
    prefill, decode = make_peer("prefill", TCP), make_peer("decode", TCP)
    ids = meet(prefill, decode)
    hand_over(prefill, decode, ids, b"a" * 16, (1, 2), (3, 4), 5)
    key = decode.expect(HANDOFF, ids[0], (7, 8))
    prefill.begin(HANDOFF, ids[1])
    assert decode.break_connections() > 0
    prefill.push(HANDOFF, 0, 4, (1, 2))
    prefill.finish(HANDOFF, 9)
    (aborted,) = prefill.events(1)
    assert isinstance(aborted, HandoffAborted)
    decode.cancel(key)
    assert decode.events(1, 1.5) == [], "nobody can confirm anything"
    assert set(prefill.broken_peers()) == {ids[1]}
    names = {prefill.new_endpoint(decode.info()).endpoint for _ in range(3)}
    assert len(names) == 3
    meet(prefill, decode)
    assert decode.events(1) == [HandoffReleased(key)]
    assert prefill.broken_peers() == decode.broken_peers() == {}
    for number in range(3):
        hand_over(prefill, decode, ids, bytes([number]) * 16, (1, 2), (7, 8), number + 20)


def test_blocks_that_are_being_sent_to_a_frozen_peer_come_back(make_peer):
    """Nothing else ends a WRITE over TCP whose target stands still."""
    prefill, decode, other = (make_peer(name, TCP) for name in ("prefill", "decode", "other"))
    ids, other_ids = meet(prefill, decode), meet(prefill, other)
    decode.expect(HANDOFF, ids[0], range(60))
    prefill.begin(HANDOFF, ids[1])
    time.sleep(0.1)  # the grant arrives
    os.kill(decode.process.pid, signal.SIGSTOP)
    prefill.push(HANDOFF, 0, 4, range(60))
    assert prefill.events(1, 0.5) == []
    prefill.disconnect(ids[1])
    (aborted,) = prefill.events(1)
    assert isinstance(aborted, HandoffAborted)
    hand_over(prefill, other, other_ids, b"a" * 16, (1, 2), (3, 4), 5)


def test_another_peer_notices_nothing(make_peer):
    prefill, other, decode = (make_peer(name, TCP) for name in ("prefill", "other", "decode"))
    ids, other_ids = meet(prefill, decode), meet(other, decode)
    key = decode.expect(HANDOFF, other_ids[0], (7, 8))
    other.begin(HANDOFF, other_ids[1])
    assert prefill.break_connections() > 0
    meet(prefill, decode)
    other.fill((1, 2), 6)
    other.push(HANDOFF, 0, 4, (1, 2))
    other.finish(HANDOFF, 9)
    assert decode.events(1) == [HandoffReceived(key, 9)]
    hand_over(prefill, decode, ids, b"a" * 16, (1, 2), (3, 4), 5)


def test_within_a_machine_blocks_stay_out_until_the_process_is_gone(make_peer):
    """Frozen, it may go on."""
    prefill, decode = make_peer("prefill"), make_peer("decode")
    ids = meet(prefill, decode)
    prefill.begin(HANDOFF, ids[1])
    key = decode.expect(HANDOFF, ids[0], (7, 8))
    os.kill(prefill.process.pid, signal.SIGSTOP)
    decode.disconnect(ids[0], True)  # somebody is mistaken, and this machine's kernel knows better
    (failed,) = decode.events(2, 1.0)
    assert isinstance(failed, HandoffFailed)
    prefill.kill()
    assert decode.events(1) == [HandoffReleased(key)]


def test_from_another_machine_nothing_lands_at_a_closed_endpoint(make_peer):
    """No clock and nobody's word is needed, although the peer lives and writes on."""
    prefill, decode = make_peer("prefill", ELSEWHERE), make_peer("decode", TCP)
    ids = meet(prefill, decode)
    decode.fill(range(64), 3)
    prefill.fill((1, 2), 6)
    prefill.begin(HANDOFF, ids[1])
    key = decode.expect(HANDOFF, ids[0], (7, 8))
    prefill.push(HANDOFF, 0, 2, (1, 2))
    while decode.numbers((7, 8)) == [3.0]:
        pass
    decode.disconnect(ids[0])
    failed, released = decode.events(2)
    assert isinstance(failed, HandoffFailed)
    assert released == HandoffReleased(key)
    decode.fill(range(64), 3)
    prefill.push(HANDOFF, 2, 4, (1, 2))
    (aborted,) = prefill.events(1, 3.0)
    assert isinstance(aborted, HandoffAborted)
    assert decode.events(1, 0.2) == []
    assert decode.numbers(range(64)) == [3.0]


def test_from_another_machine_blocks_behind_the_shared_endpoint_stay_out_until_its_end_is_confirmed(make_peer):
    prefill, decode = make_peer("prefill", ELSEWHERE), make_peer("decode", TCP)
    ids = prefill.info().engine_id, decode.info().engine_id
    prefill.connect(decode.info())
    decode.connect(prefill.info())
    prefill.probe(ids[1])
    key = decode.expect(HANDOFF, ids[0], (7, 8))
    decode.disconnect(ids[0])
    (failed,) = decode.events(2, 1.0)
    assert isinstance(failed, HandoffFailed)
    prefill.kill()
    decode.disconnect(ids[0], True)
    assert decode.events(1) == [HandoffReleased(key)]
