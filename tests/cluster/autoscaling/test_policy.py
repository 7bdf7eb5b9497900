"""When a pool grows and shrinks: numbers, and a clock of the test's own."""

from __future__ import annotations

import pytest

from cluster.autoscaling.policy import PoolPolicy, PoolSignals, ScalingRules
from cluster.gateway.latency_windows import RecentMean, RecentQuantile

RULES = ScalingRules(objective_s=1.0)


class Simulated:
    """A pool whose target is followed at once, looked at every five seconds."""

    def __init__(self, rules: ScalingRules = RULES, target: int = 2, minimum: int = 1, maximum: int = 8) -> None:
        self.now = 1000.0
        self.target, self.bounds = target, (minimum, maximum)
        self.policy = PoolPolicy(rules, lambda: self.now)
        self.whys: list[str] = []

    def run(
        self,
        seconds: float,
        latency_s: float | None = None,
        *,
        queued: int = 0,
        occupancy: float = 0.0,
        busy: float = 0.0,
        ready: int | None = None,
        stuck: int = 0,
    ) -> list[tuple[float, int]]:
        """The changes, each with the seconds since the beginning of this run."""
        changes, began = [], self.now
        while self.now < began + seconds:
            serving = self.target - stuck if ready is None else ready
            absent = (("", RULES.start_patience_s),) * stuck
            loads = (latency_s, queued, occupancy, busy)
            signals = PoolSignals(self.target, serving, *self.bounds, *loads, absent=absent)
            decision = self.policy.decide(signals)
            self.whys.append(decision.why)
            if decision.target != self.target:
                self.target = decision.target
                changes.append((self.now - began, decision.target))
            self.now += 5.0
        return changes


@pytest.mark.parametrize(
    ("pressure", "cause"),
    [
        ({"latency_s": 1.2}, "latency 1.2 s of 1 s"),
        ({"occupancy": 0.95}, "95% taken of 90%"),
        ({"queued": 9}, "9 requests wait"),
    ],
)
def test_what_lasts_makes_a_pool_grow_and_the_cause_is_told(pressure, cause):
    pool = Simulated()
    assert pool.run(20, **pressure) == [(15.0, 3)]
    assert cause in pool.whys[-1]
    assert "not for 15 s yet" in pool.whys[0]


def test_a_peak_that_passes_changes_nothing():
    pool = Simulated()
    for _ in range(20):
        assert pool.run(10, 5.0) == []
        assert pool.run(10, 0.8) == []


def test_steps_are_bounded_and_there_is_a_pause_between_them():
    pool = Simulated()
    assert pool.run(120, 100.0) == [(15.0, 4), (45.0, 6), (75.0, 8)], "by two at most, every 30 s, up to the maximum"


def test_idleness_gives_back_one_worker_at_a_time_down_to_the_minimum():
    pool = Simulated(target=4, minimum=2)
    assert pool.run(1500) == [(300.0, 3), (600.0, 2)]


def test_between_the_thresholds_nothing_moves():
    pool = Simulated()
    assert pool.run(3600, 0.99, occupancy=0.89) == []
    assert pool.run(3600, 0.1, occupancy=0.46) == []
    assert pool.run(3600, 0.1, busy=0.6) == []
    assert pool.run(3600, 0.85) == [], "nothing to do, but slow"


def test_nobody_is_given_back_who_would_be_missed():
    pool = Simulated(ScalingRules(objective_s=1.0, shrink_below=0.9), target=3)
    assert pool.run(3600, occupancy=0.9 * 0.8) == [], "two would bear 1.2"
    assert pool.run(3600, occupancy=0.9 * 0.6) == [(295.0, 2)], "two bear 0.9, one would bear 1.8"


def test_a_latency_that_no_number_of_workers_could_lower_keeps_nobody():
    assert Simulated(target=2).run(3600, 0.7, occupancy=0.02) == [(300.0, 1)]


def test_to_be_always_busy_is_no_reason_to_grow():
    assert Simulated().run(3600, 0.7, busy=1.0) == []


def test_a_load_that_follows_the_size_does_not_make_it_swing():
    """Work of 1.7 workers: two bear 0.85 each. One bears too much, and three bear enough that none is given back."""
    pool = Simulated(target=1)
    changes = []
    for _ in range(3600 // 5):
        changes += pool.run(5, 1.7 / pool.target, busy=min(1.0, 1.7 / pool.target))
    assert len(changes) == 1
    assert pool.target == 2


def test_while_workers_start_no_more_are_asked_for():
    pool = Simulated()
    assert pool.run(600, 100.0, ready=1) == []
    assert "1 of 2 workers are ready" in pool.whys[-1]


def test_a_place_that_never_starts_holds_up_nothing():
    pool = Simulated(target=3)
    assert pool.run(120, 20.0, stuck=1) == [(15.0, 5), (45.0, 7), (75.0, 8)]
    pool = Simulated(target=3)
    assert pool.run(1200, stuck=1) == [(300.0, 2)], "whoever does not serve goes first"
    pool = Simulated(target=1)
    assert pool.run(30, 20.0, stuck=1) == [(15.0, 3)], "another place may do better"
    assert Simulated(target=1).run(3600, 0.9, stuck=1) == [], "but nobody needs it"


def test_where_more_do_not_start_than_serve_no_more_are_asked_for():
    pool = Simulated(target=4)
    assert pool.run(600, 20.0, ready=1, stuck=3) == [(15.0, 6)], "and then those are waited for"
    pool = Simulated(target=5)
    assert pool.run(600, 20.0, ready=1, stuck=4) == []
    assert "4 of 5 workers do not start" in pool.whys[-1]


def test_who_starts_is_waited_for_beside_one_that_never_does():
    pool = Simulated(target=4)
    assert pool.run(600, 20.0, ready=2, stuck=1) == []
    assert "2 of 4 workers are ready" in pool.whys[-1]


def test_a_low_hour_with_a_peak_in_every_window_keeps_its_workers():
    pool = Simulated(target=3)
    for _ in range(12):
        assert pool.run(280) == []
        assert pool.run(5, 0.9) == []


def test_a_target_out_of_bounds_is_brought_back():
    pool = Simulated(target=9, maximum=8)
    assert pool.run(5, 0.7) == [(0.0, 8)]


def test_latencies_are_forgotten():
    now = 0.0
    quantile, mean = RecentQuantile(30.0, lambda: now), RecentMean(30.0, lambda: now)
    assert (quantile.quantile(0.9), mean.mean()) == (None, None)
    for value in range(10):
        quantile.add(float(value))
        mean.add(value * 2.0, 2)
    assert quantile.quantile(0.9) == 8.0
    assert quantile.quantile(0.5) == 4.0
    assert mean.mean() == 4.5
    now = 20.0
    mean.add(100.0, 1)
    quantile.add(100.0)
    assert mean.mean() == pytest.approx(190.0 / 21)
    now = 40.0
    assert (quantile.quantile(0.0), mean.mean()) == (100.0, 100.0)
    now = 60.0
    assert (quantile.quantile(0.9), mean.mean()) == (None, None)


@pytest.mark.parametrize(("ttft_s", "after"), [(2.0, 4), (0.9, 2), (0.5, 1)])
def test_prompts_that_a_decode_pool_computes_have_an_objective_of_their_own(ttft_s, after):
    """Above it the pool grows; not far below it, the pool does not shrink although it has little to do."""
    seconds = [0.0]
    rules = ScalingRules(0.05, local_ttft_s=1.0, grow_after_s=15.0, shrink_after_s=15.0)
    policy = PoolPolicy(rules, lambda: seconds[0])
    target, whys = 2, []
    for seconds[0] in (0.0, 5.0, 10.0, 15.0):
        decision = policy.decide(PoolSignals(2, 2, 1, 8, 0.01, 0, 0.1, local_ttft_s=ttft_s))
        target, whys = decision.target, [*whys, decision.why]
    assert target == after
    assert f"first token after {ttft_s:g} s of 1 s" in whys[-1]
