"""Counts that are added to with every token: plain numbers, put into Prometheus's form when it asks for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


class BatchHistogram(Collector):
    """A histogram without labels of its own that takes many equal values at once; of one thread.

    `prometheus_client.Histogram` takes one value at a time, under a lock, and walks its buckets for it.

    Args:
        name: with its prefix.
        text: its help.
        labels: names and their values.
        bounds: the buckets' upper bounds, ascending; one without a bound follows.
    """

    def __init__(self, name: str, text: str, labels: dict[str, str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(bounds)
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
