"""Ways compared round by round."""

from __future__ import annotations

import random

import pytest

from benchmarks.paired_rounds import in_rounds, ratio


def test_noise_that_meets_both_alike_is_no_difference_and_a_real_one_is_found() -> None:
    rng = random.Random(5)
    loud = [1.0]
    asked: list[str] = []

    def needs(name: str, cost: float) -> float:
        if len(asked) % 2 == 0:  # another round: the rest of the machine does something else
            loud[0] = rng.uniform(1.0, 3.0)
        asked.append(name)
        return cost * loud[0] * rng.uniform(0.99, 1.01)

    found = in_rounds({"one": lambda: needs("one", 100.0), "other": lambda: needs("other", 105.0)}, 40)
    assert [len(found[name]) for name in ("one", "other")] == [40, 40]
    assert {tuple(asked[at : at + 2]) for at in range(0, 80, 2)} == {("one", "other"), ("other", "one")}
    more = ratio(found["other"], found["one"])
    assert more.median == pytest.approx(1.05, abs=0.01)
    assert 1.03 < more.low < 1.05 < more.high < 1.07
    assert ratio(found["one"], found["one"]).more() == "+0.0% (+0.0% … +0.0%)"


def test_bounds_are_those_of_the_binomial_distribution() -> None:
    ordered = [float(number) for number in range(1, 16)]  # of 15 the 4th and the 12th hold the median in 96.5 %
    found = ratio(random.Random(1).sample(ordered, 15), [1.0] * 15)
    assert (found.median, found.low, found.high) == (8.0, 4.0, 12.0)
    few = ratio([3.0, 1.0, 2.0], [1.0] * 3)
    assert (few.low, few.high) == (1.0, 3.0)
