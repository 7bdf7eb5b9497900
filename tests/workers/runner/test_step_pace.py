"""The pace of served steps, on plain numbers."""

from __future__ import annotations

import pytest

from workers.runner.step_pace import StepPace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(pace: StepPace, clock: Clock, steps: int, measured_s: float, predicted_s: float = 0.01) -> None:
    for _ in range(steps):
        pace.launched(predicted_s)
        clock.now += measured_s
        pace.landed()


def test_nothing_is_said_before_there_is_something_to_say_and_after_a_minute_without(clock: Clock) -> None:
    pace = StepPace(clock)
    serve(pace, clock, 15, 0.01)
    assert pace.ratio == 0
    serve(pace, clock, 1, 0.01)
    assert pace.ratio == 1
    clock.now += 61
    assert pace.ratio == 0


def test_it_follows_a_drift_by_a_factor_of_one_and_a_half_at_most(clock: Clock) -> None:
    pace = StepPace(clock)
    found = []
    for _ in range(4):
        serve(pace, clock, 16, 0.02)
        found.append(pace.ratio)
    assert found == [1.5, 2, 2, 2]
    serve(pace, clock, 16, 0.001)
    assert pace.ratio == pytest.approx(2 / 1.5, rel=1e-2)


def test_a_start_that_measured_twenty_times_too_much_is_set_right(clock: Clock) -> None:
    pace = StepPace(clock)
    serve(pace, clock, 8 * 16, 0.0012, predicted_s=0.027)
    assert pace.ratio == pytest.approx(0.0012 / 0.027, rel=1e-2)


def test_seven_slow_steps_of_sixteen_are_no_matter(clock: Clock) -> None:
    pace = StepPace(clock)
    serve(pace, clock, 7, 1.0)
    serve(pace, clock, 9, 0.01)
    assert pace.ratio == 1


def test_a_step_that_waits_for_the_one_before_counts_from_its_end(clock: Clock) -> None:
    pace = StepPace(clock)
    pace.launched(0.01)
    for _ in range(16):
        pace.launched(0.01)  # one ahead
        clock.now += 0.01
        pace.landed()
    assert pace.ratio == 1


def test_a_step_without_a_prediction_is_not_compared(clock: Clock) -> None:
    pace = StepPace(clock)
    serve(pace, clock, 100, 0.5, predicted_s=0.0)
    assert pace.ratio == 0
