"""What the autoscaler sees of the pools: who serves, who does not and since when."""

from __future__ import annotations

from cluster.api import PoolTarget
from cluster.autoscaling.signals import pool_signals
from cluster.pools.replica import Replica
from fake_workers import FakeWorker


def test_places_without_a_worker_that_serves_are_told_with_how_long_they_had_none():
    replicas = [Replica(lambda: None, FakeWorker(f"decode-{i}", []), "own") for i in range(4)]
    for replica, state in zip(replicas, ("ready", "stalled", "draining", "starting"), strict=True):
        replica.state = state
        replica.absent_since -= 400.0
    nothing = {"prefill": None, "decode": None}
    signals = pool_signals(
        replicas, [PoolTarget("decode", 3, 1, 9, "own")], nothing, {"prefill": 0.0, "decode": 0.0}, 0
    )["decode"]
    assert (signals.target, signals.ready) == (3, 1)
    ((group, seconds),) = signals.absent
    assert group == "own"
    assert 400.0 <= seconds < 460.0


def test_what_a_place_had_before_counts_and_another_worker_that_does_not_start_does_not():
    replica = Replica(lambda: FakeWorker("decode-0", []), FakeWorker("decode-0", []))
    replica.state = "ready"
    replica.absent_since -= 400.0
    replica.state = "lost"
    lost_at = replica.absent_since
    for _ in range(2):
        replica.renew()
        replica.state = "lost"
    assert replica.absent_since == lost_at
