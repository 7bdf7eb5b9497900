"""Parametrisations of which the normal run takes one of each kind, and `make test-all` the rest as well."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import pytest
from _pytest.mark import ParameterSet

T = TypeVar("T")


def slow_unless(kept: Callable[[T], bool], values: Iterable[T]) -> list[Any]:
    """The values of a parametrisation, those `slow` that are not kept.

    Args:
        kept: of a value, for a `pytest.param` of its values: whether the normal run takes it.
        values: of one parameter, tuples of several, or `pytest.param`s.
    """
    return [value if kept(value) else _slow(value) for value in values]


def _slow(value: Any) -> ParameterSet:
    if isinstance(value, ParameterSet):
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.slow])
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def one_of_each(values: Iterable[T], kinds: Callable[[T], Iterable[Hashable]]) -> list[Any]:
    """The values of a parametrisation, few of which show all that can be shown, and the rest `slow`.

    What shows most that nothing has shown yet is taken next (the greedy cover of a set).

    Args:
        values: as for `slow_unless`.
        kinds: of a value: all that it shows.
    """
    every = list(values)
    rest = {number: frozenset(kinds(value)) for number, value in enumerate(every)}
    kept: set[int] = set()
    while rest:
        number, shown = max(rest.items(), key=lambda item: len(item[1]))
        kept.add(number)
        rest = {other: more for other, own in rest.items() if (more := own - shown)}
    return [value if number in kept else _slow(value) for number, value in enumerate(every)]
