"""The last minutes, second by second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

KEPT_S = 300
STEP_S = 5


@dataclass
class Second:
    """What happened in one second.

    Attributes:
        at: which one, in whole seconds of the clock.
        ttft_s: times to the first token, of requests that had it then.
        tpot_s: mean times between tokens, of requests that finished then.
        queued: requests that waited at its end; None: nobody has looked.
        kv_used: by pool, the share of KV blocks in use.
    """

    at: int
    arrived: int = 0
    finished: int = 0
    good: int = 0
    failed: int = 0
    tokens: int = 0
    handoffs: int = 0
    kv_bytes: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    queued: int | None = None
    kv_used: dict[str, float] = field(default_factory=dict)


class Seconds:
    """The last `KEPT_S` seconds.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: deque[Second] = deque(maxlen=KEPT_S)

    @property
    def current(self) -> Second:
        """The one that it is now."""
        at = int(self._clock())
        if not self._kept or self._kept[-1].at != at:
            self._kept.append(Second(at))
        return self._kept[-1]

    def last(self, seconds: int) -> list[Second]:
        """Those of the last so many seconds in which anything happened, this one included."""
        begin = int(self._clock()) - seconds
        return [second for second in self._kept if second.at > begin]

    def series(self) -> dict[str, list[Any]]:
        """The whole time in steps of `STEP_S` seconds, oldest first: rates by second, latencies in seconds."""
        steps: list[list[Second]] = [[] for _ in range(KEPT_S // STEP_S)]
        newest = int(self._clock())
        for second in self._kept:
            if (age := newest - second.at) < KEPT_S:
                steps[-1 - age // STEP_S].append(second)
        return {
            "arrived": [_rate(step, "arrived") for step in steps],
            "good": [_rate(step, "good") for step in steps],
            "finished": [_rate(step, "finished") for step in steps],
            "failed": [_rate(step, "failed") for step in steps],
            "tokens": [_rate(step, "tokens") for step in steps],
            "ttft_p50_s": [quantile(values_of(step, "ttft_s"), 0.5) for step in steps],
            "ttft_p90_s": [quantile(values_of(step, "ttft_s"), 0.9) for step in steps],
            "tpot_p50_s": [quantile(values_of(step, "tpot_s"), 0.5) for step in steps],
            "queued": [max((s.queued for s in step if s.queued is not None), default=None) for step in steps],
            "kv_prefill": [_fullest(step, "prefill") for step in steps],
            "kv_decode": [_fullest(step, "decode") for step in steps],
        }


def values_of(seconds: Sequence[Second], name: str) -> list[float]:
    """All values of a list of these seconds."""
    return [value for second in seconds for value in getattr(second, name)]


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that about this share is not above; None: there is none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def _rate(step: Sequence[Second], name: str) -> float:
    return float(sum(getattr(second, name) for second in step)) / STEP_S


def _fullest(step: Sequence[Second], role: str) -> float | None:
    return max((second.kv_used[role] for second in step if role in second.kv_used), default=None)
