"""How far tests by generated inputs go: the same inputs at every run, or with `--hypothesis-profile=deep` others.

`make fuzz` runs those that are marked `fuzz` so. What it finds it prints, and keeps in .hypothesis; an input that
showed a fault stays in its test as an `@example`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

DEEP = "deep"
_TIMES = 25
_HEALTH = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

settings.register_profile(DEEP, settings(print_blob=True))


def fuzzed(max_examples: int, **others: Any) -> settings:
    """The settings of one test: so many inputs in every run of the tests, many times as many in the deep one."""
    deep = settings.get_current_profile_name() == DEEP
    return settings(
        max_examples=max_examples * _TIMES if deep else max_examples,
        derandomize=not deep,
        deadline=None,
        suppress_health_check=[*_HEALTH, HealthCheck.function_scoped_fixture],
        **others,
    )
