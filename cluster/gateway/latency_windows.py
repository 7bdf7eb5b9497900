"""What requests have lately experienced, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver, Received
from workers.messages import PrefillReport

_MOST_SAMPLES = 4096
_WINDOW_S = 30.0


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


class LatencyWindows(EngineObserver):
    """What the autoscaler looks at: the latencies that each pool has lately given, without the wait at the gateway.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._ttft_s = RecentQuantile(_WINDOW_S, clock)
        self._local_ttft_s = RecentQuantile(_WINDOW_S, clock)
        self._itl_s = RecentMean(_WINDOW_S, clock)
        self._prompts_s = {role: RecentMean(_WINDOW_S, clock) for role in ("prefill", "decode")}

    def first_token(self, attempt: Attempt) -> None:
        """See `EngineObserver.first_token`."""
        ttft_s = self._ttft_s if attempt.prefill else self._local_ttft_s
        ttft_s.add(attempt.first_token_at - attempt.dispatched)

    def tokens_received(self, received: Sequence[Received]) -> None:
        """See `EngineObserver.tokens_received`."""
        total_s, count = 0.0, 0
        for _, num_tokens, seconds in received:
            if seconds is not None:
                total_s += seconds
                count += num_tokens
        if count:
            self._itl_s.add(total_s, count)

    def prefill_reported(self, attempt: Attempt, report: PrefillReport) -> None:
        """See `EngineObserver.prefill_reported`."""
        self._prompts_s["prefill" if attempt.prefill else "decode"].add(report.prefill_s, 1)

    @property
    def latencies_s(self) -> dict[str, float | None]:
        """By pool: of prefill the 90th percentile to the first token, of decode the mean between tokens."""
        return {"prefill": self._ttft_s.quantile(0.9), "decode": self._itl_s.mean()}

    @property
    def local_ttft_s(self) -> float | None:
        """The 90th percentile to the first token of prompts that decode workers have computed."""
        return self._local_ttft_s.quantile(0.9)

    @property
    def prompt_work(self) -> dict[str, float]:
        """By pool: seconds of computing prompts in a second."""
        return {role: work.rate() for role, work in self._prompts_s.items()}
