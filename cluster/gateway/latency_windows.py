"""What requests have lately experienced, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_MOST_SAMPLES = 4096


class RecentQuantile:
    """A quantile of the values of the last seconds.

    Args:
        window_s: how far back it looks.
        clock: seconds.
    """

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s = window_s
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MOST_SAMPLES)

    def add(self, value: float) -> None:
        """Note a value, now."""
        self._samples.append((self._clock(), value))

    def quantile(self, share: float) -> float | None:
        """The value that about this share (0 to 1) is not above, of few values a lower one; None: there was none."""
        begin = self._clock() - self._window_s
        while self._samples and self._samples[0][0] < begin:
            self._samples.popleft()
        values = sorted(value for _, value in self._samples)
        return values[int(share * (len(values) - 1))] if values else None


class RecentMean:
    """The mean of the values of the last seconds, by buckets of a tenth of them.

    Args:
        window_s: how far back it looks.
        clock: seconds.
    """

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._bucket_s = window_s / 10
        self._clock = clock
        self._buckets: deque[tuple[int, float, int]] = deque(maxlen=11)

    def add(self, total: float, count: int) -> None:
        """Note so many values, of which the sum is known, now."""
        number = int(self._clock() / self._bucket_s)
        if self._buckets and self._buckets[-1][0] == number:
            _, total_before, count_before = self._buckets.pop()
            total, count = total + total_before, count + count_before
        self._buckets.append((number, total, count))

    def mean(self) -> float | None:
        """Their mean; None: there was none."""
        total, count = self._sums()
        return total / count if count else None

    def rate(self) -> float:
        """Their sum by second."""
        return self._sums()[0] / (self._bucket_s * 10)

    def _sums(self) -> tuple[float, int]:
        oldest = int(self._clock() / self._bucket_s) - 10
        recent = [bucket for bucket in self._buckets if bucket[0] >= oldest]
        return sum(bucket[1] for bucket in recent), sum(bucket[2] for bucket in recent)
