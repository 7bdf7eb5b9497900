"""The metrics of one service as objects, by the names of the catalog, and their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from cluster.metrics.catalog import CATALOG, Metric, token_buckets
from cluster.metrics.tallies import Count, Distribution, Tally

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
        self._constant = {"model_name": model_name, "engine": "0"}
        self._max_model_len = max_model_len
        self._names = names
        self._prometheus = CollectorRegistry(auto_describe=False)
        self._metrics = {metric.name: metric for metric in CATALOG}

    def prefixed(self, metric: Metric) -> str:
        """A metric's name with its prefix."""
        return (VLLM_PREFIX if metric.vllm and self._names == "vllm" else PREFIX) + metric.name

    def counter(self, name: str) -> Count:
        """A counter without labels of its own."""
        return self.counters(name).labels()

    def counters(self, name: str) -> Tally:
        """A counter with labels of its own: a number for each combination."""
        metric = self._metrics[name]
        made = Tally(self.prefixed(metric), metric.help, self._given(metric), metric.labels)
        self._prometheus.register(made)
        return made

    def histogram(self, name: str) -> Distribution:
        """A histogram."""
        metric = self._metrics[name]
        bounds = token_buckets(self._max_model_len) if metric.buckets == "tokens" else metric.buckets
        made = Distribution(self.prefixed(metric), metric.help, self._given(metric), bounds)
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

    def register(self, collector: Collector) -> None:
        """Ask this one too: its `collect` may use `family`."""
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
