"""What is added to with every token and request: plain numbers, put into Prometheus's form when it asks for them.

The client library's own counters and histograms take a lock each time, and walk the buckets: with some twenty of them
a request, and two a token, that is a few hundredths of the gateway's processor time. These belong to the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


class Count:
    """A number that grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add so much."""
        self.value += amount


class Tally(Collector):
    """A counter: one number for each combination of its own labels' values.

    Args:
        name: with its prefix.
        text: its help.
        given: labels that are the same for all, and their values.
        labels: names of all labels, in order.
    """

    def __init__(self, name: str, text: str, given: Mapping[str, str], labels: Sequence[str]) -> None:
        self._name, self._text, self._given, self._all = name, text, given, labels
        self._own = tuple(label for label in labels if label not in given)
        self._counts: dict[tuple[str, ...], Count] = {} if self._own else {(): Count()}

    def labels(self, *values: str) -> Count:
        """The number of these values of its own labels, in order; none, where it has none."""
        count = self._counts.get(values)
        if count is None:
            if len(values) != len(self._own):
                raise ValueError(f"{self._name} has the labels {self._own}, and {values} are given")
            count = self._counts[values] = Count()
        return count

    def collect(self) -> Iterable[Family]:
        """As Prometheus has it."""
        family = CounterMetricFamily(self._name, self._text, labels=list(self._all))
        for values, count in self._counts.items():
            by_name = {**self._given, **dict(zip(self._own, values, strict=True))}
            family.add_metric([by_name[label] for label in self._all], count.value)
        yield family


class Distribution(Collector):
    """A histogram without labels of its own.

    Args:
        name: with its prefix.
        text: its help.
        labels: names and their values.
        bounds: the buckets' upper bounds, ascending; one without a bound follows.
    """

    def __init__(self, name: str, text: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Note a value that has come so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Family]:
        """As Prometheus has it."""
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
