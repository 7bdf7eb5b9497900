"""The metrics of one service as objects, by the names of the catalog, and their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family

from cluster.metrics.catalog import CATALOG, Metric, token_buckets
from cluster.metrics.histogram import BatchHistogram

PREFIX, VLLM_PREFIX = "baton:", "vllm:"
Names = Literal["baton", "vllm"]
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsRegistry:
    """Every metric of the catalog, each with the served model's name.

    Args:
        model_name: value of the label of this name.
        max_model_len: context window, tokens; the last bucket of token counts.
        names: "vllm" publishes those that vLLM has, too, under its prefix; the others keep Baton's.
    """

    def __init__(self, model_name: str, max_model_len: int, names: Names = "baton") -> None:
        disable_created_metrics()  # a second series of each, which nobody has asked for
        self._constant = {"model_name": model_name, "engine": "0"}
        self._max_model_len = max_model_len
        self._names = names
        self._prometheus = CollectorRegistry(auto_describe=False)
        self._metrics = {metric.name: metric for metric in CATALOG}

    def prefixed(self, metric: Metric) -> str:
        """A metric's name with its prefix."""
        return (VLLM_PREFIX if metric.vllm and self._names == "vllm" else PREFIX) + metric.name

    def counter(self, name: str) -> Any:
        """A counter: with `inc` where it has no labels of its own, else with `labels(...)` first."""
        metric = self._metrics[name]
        made = Counter(self.prefixed(metric), metric.help, metric.labels, registry=self._prometheus)
        return _Bound(made, self._given(metric), self._free(metric))()

    def histogram(self, name: str) -> Any:
        """A histogram with `observe`."""
        metric = self._metrics[name]
        made = Histogram(
            self.prefixed(metric), metric.help, metric.labels, buckets=self._buckets(metric), registry=self._prometheus
        )
        return _Bound(made, self._given(metric), self._free(metric))()

    def gauge(self, name: str) -> Any:
        """A gauge with `set`."""
        metric = self._metrics[name]
        made = Gauge(self.prefixed(metric), metric.help, metric.labels, registry=self._prometheus)
        return _Bound(made, self._given(metric), self._free(metric))()

    def batch_histogram(self, name: str) -> BatchHistogram:
        """A histogram that takes many equal values at once."""
        metric = self._metrics[name]
        made = BatchHistogram(self.prefixed(metric), metric.help, self._given(metric), self._buckets(metric))
        self._prometheus.register(made)
        return made

    def family(self, name: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> Family:
        """A gauge or counter read off something when it is asked for: values by the labels that are its own."""
        metric = self._metrics[name]
        make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = make(self.prefixed(metric), metric.help, labels=list(metric.labels))
        for labels, value in samples:
            given = {**self._constant, **labels}
            family.add_metric([given[label] for label in metric.labels], value)
        return family

    def register(self, collector: Any) -> None:
        """Ask this one too: it has `collect`, and may use `family`."""
        self._prometheus.register(collector)

    def families(self) -> list[Family]:
        """All there is now."""
        return list(self._prometheus.collect())

    def exposition(self) -> tuple[str, bytes]:
        """All there is now.

        Always in Prometheus's own text format: of OpenMetrics, the other one that it asks for, the client library
        writes names with a colon as if they had an underscore.

        Returns:
            Content type and text.
        """
        return _CONTENT_TYPE, generate_latest(self._prometheus)

    def _given(self, metric: Metric) -> dict[str, str]:
        return {label: self._constant[label] for label in metric.labels if label in self._constant}

    def _free(self, metric: Metric) -> tuple[str, ...]:
        return tuple(label for label in metric.labels if label not in self._constant)

    def _buckets(self, metric: Metric) -> tuple[float, ...]:
        return token_buckets(self._max_model_len) if metric.buckets == "tokens" else metric.buckets


class _Bound:
    """A metric with the labels that are the same everywhere, remembering its children."""

    def __init__(self, metric: Any, given: Mapping[str, str], free: tuple[str, ...]) -> None:
        self._metric, self._given, self._free = metric, given, free
        self._children: dict[tuple[str, ...], Any] = {}

    def __call__(self) -> Any:
        return self if self._free else self._metric.labels(**self._given)

    def labels(self, *values: str) -> Any:
        """The child with these values of its own labels, in order."""
        child = self._children.get(values)
        if child is None:
            own = dict(zip(self._free, values, strict=True))
            child = self._children[values] = self._metric.labels(**self._given, **own)
        return child
