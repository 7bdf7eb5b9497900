"""When a worker said what was heard of it."""

from __future__ import annotations

from cluster.ray.heartbeat_log import HeartbeatLog


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def test_what_was_heard_is_dated_never_too_late():
    clock = Clock()
    heartbeat_log = HeartbeatLog(clock)
    assert heartbeat_log.when(0) is None
    for second in range(10, 20):
        clock.now = float(second)
        heartbeat_log.note()
    assert heartbeat_log.when(0) is None
    assert heartbeat_log.when(1) == 10.0
    assert heartbeat_log.when(4) == 13.0
    assert heartbeat_log.when(10) == 19.0


def test_of_much_at_once_only_the_first_is_dated():
    clock = Clock()
    heartbeat_log = HeartbeatLog(clock)
    for _ in range(1000):
        heartbeat_log.note()
    clock.now = 11.0
    heartbeat_log.note()
    assert heartbeat_log.when(1000) == 10.0
    assert heartbeat_log.when(1001) == 11.0


def test_what_nobody_acknowledges_is_forgotten():
    clock = Clock()
    heartbeat_log = HeartbeatLog(clock)
    for second in range(10_000):
        clock.now = float(second)
        heartbeat_log.note()
    assert heartbeat_log.when(5) is None
    assert heartbeat_log.when(10_000) == 9_999.0
