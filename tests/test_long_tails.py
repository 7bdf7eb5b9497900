"""What the normal run keeps of a parametrisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _pytest.mark import ParameterSet

from long_tails import one_of_each, slow_unless


def kept(values: Sequence[Any]) -> list[Any]:
    marked = (value for value in values if isinstance(value, ParameterSet))
    slow = [value for value in marked if any(mark.name == "slow" for mark in value.marks)]
    return [value for value in values if value not in slow]


def test_the_rest_is_slow_and_nothing_is_left_out():
    values = slow_unless("a".__eq__, ["a", "b"])
    assert kept(values) == ["a"]
    assert len(values) == 2


def test_few_values_show_everything():
    words = ["ab", "a", "bc", "abcd", "e", "ea", "de"]
    values = one_of_each(words, kinds=str)
    assert kept(values) == ["abcd", "e"]
    assert len(values) == len(words)
    assert kept(one_of_each(["", ""], kinds=str)) == [""]
