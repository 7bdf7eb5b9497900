"""Parametrisations of which the normal run takes one of each kind, and `make test-all` the rest as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def every_other(values: Iterable[T], of: Callable[[T], bool] = lambda value: True) -> list[Any]:
    """The values of a parametrisation, every second one `slow`, of those that are asked about."""
    numbers = iter(range(10**9))
    return slow_unless(lambda value: not of(value) or next(numbers) % 2 == 0, values)
