"""What each worker's steps take: by what it measured at its start, what its peers did, and its pace since."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from statistics import median_low

from workers.runner.step_times import StepTimes

_OUTLIER = 3.0
_FEWEST = 3
_TYPICAL_PROMPT, _TYPICAL_BATCH = 512, 4


@dataclass
class _Known:
    """Of one worker: whom it is like, what it measured, how its steps have compared with that lately (0: unknown)."""

    alike: Hashable
    measured: StepTimes
    prefill_pace: float = 0.0
    decode_pace: float = 0.0


class StepTimeEstimates:
    """Of the workers of one pool.

    A worker that has served lately goes by its own measurements and its pace. One that has not is taken by its own
    measurements, unless they are three times those of the workers like it, or a third, where there are at least three
    of them: then something else had the machine when it measured, and what the one in the middle measured is taken
    until it has served. So it gets requests, and its pace shows whether it is slow.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._told: dict[str, StepTimes] = {}

    def add(self, engine_id: str, alike: Hashable, measured: StepTimes) -> dict[str, StepTimes]:
        """A worker is here.

        Returns:
            What has changed: the step times of this worker, and of others.
        """
        self._known[engine_id] = _Known(alike, measured)
        return self._news(alike)

    def remove(self, engine_id: str) -> dict[str, StepTimes]:
        """A worker is gone; returns as `add`."""
        known = self._known.pop(engine_id, None)
        self._told.pop(engine_id, None)
        return {} if known is None else self._news(known.alike)

    def hear(self, engine_id: str, prefill_pace: float, decode_pace: float) -> dict[str, StepTimes]:
        """A worker has said how its steps compare; returns as `add`."""
        known = self._known.get(engine_id)
        if known is None or (known.prefill_pace, known.decode_pace) == (prefill_pace, decode_pace):
            return {}
        known.prefill_pace, known.decode_pace = prefill_pace, decode_pace
        return self._news(known.alike)

    def _news(self, alike: Hashable) -> dict[str, StepTimes]:
        """Those of this kind whose step times are not what was told last."""
        group = {engine_id: known for engine_id, known in self._known.items() if known.alike == alike}
        prefill, decode = _middle(list(group.values()), True), _middle(list(group.values()), False)
        news = {}
        for engine_id, known in group.items():
            times = StepTimes(
                _own_or(known, prefill, True).prefill,
                _own_or(known, decode, False).decode,
                _own_or(known, decode, False).kv_token_s,
            )
            if times != self._told.get(engine_id):
                news[engine_id] = self._told[engine_id] = times
        return news


def _own_or(known: _Known, middle: StepTimes, prefill: bool) -> StepTimes:
    """The times of one worker: its own, by its pace if that is known, or the middle one's."""
    pace = known.prefill_pace if prefill else known.decode_pace
    if pace:
        return scaled(known.measured, pace)
    own_s, middle_s = _typical(known.measured, prefill), _typical(middle, prefill)
    return middle if middle_s and not 1 / _OUTLIER < own_s / middle_s < _OUTLIER else known.measured


def _middle(group: list[_Known], prefill: bool) -> StepTimes:
    """What the one in the middle of a kind has measured; none where there are too few to tell."""
    if len(group) < _FEWEST:
        return StepTimes()
    typical = [_typical(known.measured, prefill) for known in group]
    return group[typical.index(median_low(typical))].measured


def _typical(times: StepTimes, prefill: bool) -> float:
    return times.prefill_seconds(_TYPICAL_PROMPT) if prefill else times.decode_seconds(_TYPICAL_BATCH)


def scaled(times: StepTimes, by: float) -> StepTimes:
    """All of them, so many times as long."""
    return replace(
        times,
        prefill=tuple((size, seconds * by) for size, seconds in times.prefill),
        decode=tuple((size, seconds * by) for size, seconds in times.decode),
        kv_token_s=times.kv_token_s * by,
    )
