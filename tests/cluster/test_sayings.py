"""When a worker said what was heard of it."""

from __future__ import annotations

from cluster.sayings import Sayings


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def test_what_was_heard_is_dated_never_too_late():
    clock = Clock()
    sayings = Sayings(clock)
    assert sayings.when(0) is None
    for second in range(10, 20):
        clock.now = float(second)
        sayings.note()
    assert sayings.when(0) is None
    assert sayings.when(1) == 10.0
    assert sayings.when(4) == 13.0
    assert sayings.when(10) == 19.0


def test_of_much_at_once_only_the_first_is_dated():
    clock = Clock()
    sayings = Sayings(clock)
    for _ in range(1000):
        sayings.note()
    clock.now = 11.0
    sayings.note()
    assert sayings.when(1000) == 10.0
    assert sayings.when(1001) == 11.0


def test_what_nobody_acknowledges_is_forgotten():
    clock = Clock()
    sayings = Sayings(clock)
    for second in range(10_000):
        clock.now = float(second)
        sayings.note()
    assert sayings.when(5) is None
    assert sayings.when(10_000) == 9_999.0
