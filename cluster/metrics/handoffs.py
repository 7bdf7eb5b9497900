"""What handoffs moved, and how they ended."""

from __future__ import annotations

from cluster.gateway.attempt import Attempt
from cluster.metrics.reasons import failure_reason, worker_name
from cluster.metrics.registry import MetricsRegistry
from workers.messages import DecodeReport, HandoffReport


class HandoffMetrics:
    """Counts handoffs.

    Args:
        registry: where the metrics are.
    """

    def __init__(self, registry: MetricsRegistry) -> None:
        counter, counters, histogram = registry.counter, registry.counters, registry.histogram
        self._handoffs = counters("handoffs")
        self._bytes, self._busy_s = counters("kv_transfer_bytes"), counters("kv_transfer_busy_seconds")
        self._writes = counters("kv_transfer_writes")
        self._decode_cached = counter("decode_cached_tokens")
        self._transfer_s, self._exposed_s = histogram("kv_transfer_seconds"), histogram("kv_transfer_exposed_seconds")
        self._hidden = histogram("kv_transfer_hidden_ratio")

    def completed(self, attempt: Attempt, report: HandoffReport) -> None:
        """A handoff has ended well."""
        pair = worker_name(attempt.prefill), worker_name(attempt.decode)
        self._handoffs.labels("completed", "whole" if report.num_bytes else "all_cached").inc()
        self._bytes.labels(*pair).inc(report.num_bytes)
        self._busy_s.labels(*pair).inc(report.transfer_s)
        self._writes.labels(*pair).inc(report.num_parts)
        self._transfer_s.observe(report.transfer_s)
        self._exposed_s.observe(report.exposed_s)
        if report.transfer_s > 0:
            self._hidden.observe(1.0 - min(1.0, report.exposed_s / report.transfer_s))

    def decoded(self, report: DecodeReport) -> None:
        """The decode worker has said what it had already."""
        self._decode_cached.inc(report.cached_tokens)

    def failed(self, attempt: Attempt, error: Exception) -> None:
        """An attempt has failed, and its handoff with it if that was not complete."""
        if _under_way(attempt):
            self._handoffs.labels("failed", failure_reason(error)).inc()

    def cancelled(self, attempt: Attempt, reason: str) -> None:
        """An attempt is not wanted any more."""
        if _under_way(attempt):
            self._handoffs.labels("cancelled", reason).inc()


def _under_way(attempt: Attempt) -> bool:
    """Whether it has a handoff of which nothing was reported."""
    return bool(attempt.prefill and attempt.decode) and not attempt.reported
