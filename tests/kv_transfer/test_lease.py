"""A worker that is cut off or frozen writes nothing any more when others may use the memory that it was granted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kv_transfer.connector import HandoffFailed, HandoffReceived, HandoffReleased
from kv_transfer.errors import PeerError
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.lease import Lease, lease_guard
from kv_transfer.transports.base import TransferState
from kv_transfer.transports.nixl import NixlTransport


def freeze(pid: int) -> None:
    """Stop a process, and wait until all of its threads have stopped: the signal alone does not say when they do."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    while any(not stat.read_text().rpartition(") ")[2].startswith("T") for stat in tasks.glob("*/stat")):
        time.sleep(0.001)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_begins_with_the_first_renewal_and_ends_after_the_last():
    clock = Clock()
    lease = Lease(10.0, clock)
    clock.now = 1000.0
    assert lease.holds()
    lease.renew(999.0)
    clock.now = 1008.0
    lease.renew(1005.0)
    lease.renew(1002.0)  # answers may overtake each other
    clock.now = 1014.9
    assert lease.holds()
    clock.now = 1015.0
    assert not lease.holds()


def test_what_was_said_long_ago_brings_nothing_back_and_what_is_new_does():
    """A renewal may have waited in a socket of a frozen process, and be read before anybody looks at the clock."""
    clock = Clock()
    lease = Lease(10.0, clock)
    lease.renew(100.0)
    clock.now = 160.0
    assert not lease.holds()
    lease.renew(149.9)
    assert not lease.holds()
    lease.renew(155.0)
    assert lease.holds()
    clock.now = 165.0
    assert not lease.holds()


def test_whoever_asks_after_the_end_stands_still_until_it_is_renewed(caplog):
    clock = Clock()
    lease = Lease(10.0, clock)
    guard = lease_guard(lease)
    lease.renew(100.0)
    guard()
    clock.now = 110.0
    through = threading.Event()
    asking = threading.Thread(target=lambda: (guard(), through.set()), daemon=True)
    asking.start()
    assert not through.wait(0.1)
    lease.renew(99.0)
    assert not through.wait(0.1)
    lease.renew(109.0)
    assert through.wait(20)
    assert [record.message.partition(",")[0].partition(":")[0] for record in caplog.records] == [
        "the lease is over",
        "the lease holds again",
    ]


@pytest.mark.nixl
def test_every_use_of_the_network_asks():
    """Also those that write nothing: they make the network progress, and a WRITE that was posted goes on with it."""
    layout = KVLayout((GroupLayout("full", (0, 1), 1, 1, 1, "float32"),))
    asked: list[None] = []

    def guard() -> None:
        asked.append(None)

    transports = [NixlTransport(guard=guard), NixlTransport()]
    infos = [
        transport.register(name, 1, [torch.zeros(2, 8, 2, 1, 1, 1)], layout)
        for transport, name in zip(transports, ("lease-p", "lease-d"), strict=True)
    ]
    transports[0].add_peer(infos[1])
    transports[1].add_peer(infos[0])
    asking, peer = transports[0], infos[1].engine_id
    underway = asking.write(peer, 0, range(1), [0], [0], b"m")
    assert underway.state() is TransferState.IN_FLIGHT, "the peer has not looked yet"
    uses = [
        lambda: asking.write(peer, 0, range(1), [0], [0], b"m"),
        lambda: asking.read(peer, 0, range(1), [0], [0]),
        lambda: asking.probe_bandwidth(peer, range(1), b"m"),
        lambda: asking.send(peer, b"m"),
        lambda: asking.add_peer(replace(infos[1], engine_id="another")),
        lambda: asking.new_endpoint("another"),
        lambda: NixlTransport(guard=guard).register("x", 1, [torch.zeros(2, 8, 2, 1, 1, 1)], layout),
        asking.receive,
        underway.state,
    ]
    for use in uses:
        before = len(asked)
        with contextlib.suppress(PeerError):
            use()
        assert len(asked) > before
    while underway.state() is TransferState.IN_FLIGHT:
        transports[1].receive()
    for transport in transports:
        transport.close()


@pytest.mark.nixl
def test_a_process_that_thaws_does_not_touch_the_network(make_peer):
    """Frozen with a prompt to push and before the grant reaches it, thawed when its lease is over."""
    prefill, decode = make_peer("prefill"), make_peer("decode")
    ids = prefill.info().engine_id, decode.info().engine_id
    prefill.connect(decode.info())
    decode.connect(prefill.info())
    prefill.probe(ids[1])
    prefill.begin(b"a" * 16, ids[1])
    prefill.push(b"a" * 16, 0, 4, (1, 2))
    prefill.finish(b"a" * 16, 7)
    prefill.renew_lease()
    freeze(prefill.process.pid)
    key = decode.expect(b"a" * 16, ids[0], (40, 41))
    decode.fill((40, 41), 5)
    decode.disconnect(ids[0])
    (failed,) = decode.events(2, 1.2)
    assert isinstance(failed, HandoffFailed)
    os.kill(prefill.process.pid, signal.SIGCONT)
    assert decode.events(1, 0.5) == [], "it may still write, as far as anybody knows"
    assert decode.numbers((40, 41)) == [5.0]
    assert prefill.process.is_alive()
    prefill.process.kill()
    prefill.process.join(20)
    decode.disconnect(ids[0], True)
    assert decode.events(1) == [HandoffReleased(key)]
    assert decode.numbers((40, 41)) == [5.0]


@pytest.mark.nixl
def test_a_worker_that_was_not_heard_goes_on_when_it_is(make_peer):
    """Whoever renews was silent: nothing is written meanwhile, and nothing is lost."""
    prefill, decode = make_peer("prefill"), make_peer("decode")
    ids = prefill.info().engine_id, decode.info().engine_id
    prefill.connect(decode.info())
    decode.connect(prefill.info())
    prefill.probe(ids[1])
    prefill.fill((1, 2), 3)
    prefill.renew_lease()
    time.sleep(1.05)  # the lease of these tests is a second
    prefill.begin(b"a" * 16, ids[1])
    prefill.push(b"a" * 16, 0, 4, (1, 2))
    prefill.finish(b"a" * 16, 7)
    decode.fill((40, 41), 5)
    key = decode.expect(b"a" * 16, ids[0], (40, 41))
    assert decode.events(1, 0.5) == []
    assert decode.numbers((40, 41)) == [5.0]
    prefill.renew_lease()
    (received,) = decode.events(1)
    assert isinstance(received, HandoffReceived)
    assert received.key == key
    assert decode.numbers((40, 41)) == [3.0]
