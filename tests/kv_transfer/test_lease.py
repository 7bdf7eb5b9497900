"""A worker that is cut off or frozen writes nothing any more when others may use the memory that it was granted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_transfer.connector import HandoffAborted, HandoffFailed, HandoffReleased
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.lease import Lease
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric


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


def test_a_renewal_that_comes_too_late_brings_nothing_back():
    """It may have waited in a socket of a frozen process, and be read before anybody looks at the clock."""
    clock = Clock()
    lease = Lease(10.0, clock)
    lease.renew(100.0)
    clock.now = 160.0
    lease.renew(160.0)
    assert not lease.holds()
    clock.now = 161.0
    assert not lease.holds()


def test_blocks_of_a_peer_that_may_still_write_are_kept_until_it_cannot():
    fabric, layout = LocalFabric(), KVLayout((GroupLayout("full", tuple(range(2)), 1, 1, 1, "float32"),))
    p, d = LocalConnector(fabric), LocalConnector(fabric)
    p_info = p.register_kv_caches("p", [torch.zeros(2, 8, 2, 1, 1, 1)], layout)
    d_info = d.register_kv_caches("d", [torch.zeros(2, 8, 2, 1, 1, 1)], layout)
    p.connect(d_info, 5.0)
    d.connect(p_info, 5.0)
    kept = d.expect(b"a" * 16, p_info.engine_id, [GroupBlocks(0, [1])])
    released = d.expect(b"b" * 16, "nobody", [GroupBlocks(0, [2])])
    assert HandoffReleased(released) in d.poll()
    d.disconnect(p_info.engine_id, 3600.0)
    assert [type(event) for event in d.poll()] == [HandoffFailed], "its request need not wait"
    other = d.expect(b"c" * 16, p_info.engine_id, [GroupBlocks(0, [3])])
    assert [event for _ in range(20) for event in d.poll() if isinstance(event, HandoffReleased)] == [
        HandoffReleased(other)
    ], "it never got that grant"
    assert kept not in (other, released)


@pytest.mark.nixl
def test_a_process_that_thaws_does_not_write_to_blocks_that_it_was_granted(make_peer):
    """Frozen before the grant reaches it, thawed when its blocks are another's. Without its lease it would write."""
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
    decode.disconnect(ids[0], 1.0)
    failed, released = decode.events(2)
    assert isinstance(failed, HandoffFailed)
    assert released == HandoffReleased(key)
    decode.fill((40, 41), 5)
    os.kill(prefill.process.pid, signal.SIGCONT)
    (ended,) = prefill.events(1)
    assert isinstance(ended, HandoffAborted)
    time.sleep(0.2)
    assert decode.events(1, 0.1) == [], "whatever it says now is not believed"
    assert np.array_equal(decode.blocks((40, 41)), np.full_like(decode.blocks((40, 41)), 5.0))
