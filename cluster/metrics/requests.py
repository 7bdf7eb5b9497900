"""What happens to requests, counted as it happens."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.errors import QueueFullError, ShuttingDownError
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver, Received
from cluster.metrics.handoffs import HandoffMetrics
from cluster.metrics.reasons import error_name, failure_reason
from cluster.metrics.registry import MetricsRegistry
from cluster.routing.types import NoPlacement, Placement
from workers.errors import InvalidRequestError
from workers.messages import DecodeReport, HandoffReport, PrefillReport

_REFUSALS = (QueueFullError, ShuttingDownError, InvalidRequestError)


class RequestMetrics(EngineObserver):
    """Counts what the engine tells.

    Args:
        registry: where the metrics are.
    """

    def __init__(self, registry: MetricsRegistry) -> None:
        counter, counters, histogram = registry.counter, registry.counters, registry.histogram
        self._handoffs = HandoffMetrics(registry)
        self._queries, self._hits = counter("prefix_cache_queries"), counter("prefix_cache_hits")
        self._prompt_tokens, self._cached_tokens = counter("prompt_tokens"), counter("prompt_tokens_cached")
        self._generation_tokens = counter("generation_tokens")
        self._preemptions = counter("num_preemptions")
        self._ends = counters("request_success")
        self._refused, self._failures = counters("requests_refused"), counters("request_failures")
        self._migrations, self._attempts = counters("migrations"), counters("attempts")
        self._local_prefills = counter("local_prefills")
        self._prompt_size = histogram("request_prompt_tokens")
        self._output_size = histogram("request_generation_tokens")
        self._max_tokens = histogram("request_params_max_tokens")
        self._ttft_s = histogram("time_to_first_token_seconds")
        self._itl_s = histogram("inter_token_latency_seconds")
        self._tpot_s = histogram("request_time_per_output_token_seconds")
        self._latency_s = histogram("e2e_request_latency_seconds")
        self._queue_s = histogram("request_queue_time_seconds")
        self._prefill_s = histogram("request_prefill_time_seconds")
        self._decode_s = histogram("request_decode_time_seconds")
        self._inference_s = histogram("request_inference_time_seconds")
        self._num_attempts = histogram("request_attempts")
        self._at_gateway_s, self._at_worker_s = histogram("gateway_queue_seconds"), histogram("prefill_queue_seconds")
        self._compute_s, self._chunks = histogram("prefill_seconds"), histogram("prefill_chunks")
        self._first_decode_s = histogram("first_decode_seconds")
        self._decisions, self._decision_s = counters("router_decisions"), histogram("router_decision_seconds")

    def router_decided(self, request: EngineRequest, decision: Placement | NoPlacement, seconds: float) -> None:
        """See `EngineObserver.router_decided`."""
        self._decision_s.observe(seconds)
        if isinstance(decision, NoPlacement):
            self._decisions.labels("none", "impossible" if decision.hopeless else "no_room").inc()
            return
        reason = "prefix_cache" if decision.cached_tokens else "predicted_time"
        self._decisions.labels("pair" if decision.prefill else "decode_alone", reason).inc()

    def request_placed(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_placed`."""
        if not attempt.output_before and attempt.attempts == 1:
            self._at_gateway_s.observe(now() - attempt.arrived)

    def first_token(self, attempt: Attempt) -> None:
        """See `EngineObserver.first_token`; one that goes on after a migration is not the request's first."""
        if not attempt.output_before:
            self._ttft_s.observe(attempt.first_token_at - attempt.arrived)

    def tokens_received(self, received: Sequence[Received]) -> None:
        """See `EngineObserver.tokens_received`."""
        total = 0
        for _, num_tokens, seconds in received:
            total += num_tokens
            if seconds is not None:
                self._itl_s.observe(seconds / num_tokens, num_tokens)
        self._generation_tokens.inc(total)

    def prefill_reported(self, attempt: Attempt, report: PrefillReport) -> None:
        """See `EngineObserver.prefill_reported`."""
        self._queries.inc(attempt.num_tokens)
        self._hits.inc(report.cached_tokens)
        if not attempt.output_before:
            self._prompt_tokens.inc(attempt.num_tokens)
            self._cached_tokens.inc(report.cached_tokens)
        self._at_worker_s.observe(report.queue_s)
        self._compute_s.observe(report.prefill_s)
        self._chunks.observe(report.num_chunks)
        if not attempt.prefill:
            self._local_prefills.inc()

    def handoff_reported(self, attempt: Attempt, report: HandoffReport) -> None:
        """See `EngineObserver.handoff_reported`."""
        self._handoffs.completed(attempt, report)

    def decode_reported(self, attempt: Attempt, report: DecodeReport) -> None:
        """See `EngineObserver.decode_reported`."""
        self._first_decode_s.observe(report.first_decode_s)
        self._handoffs.decoded(report)

    def request_preempted(self, attempt: Attempt) -> None:
        """See `EngineObserver.request_preempted`."""
        self._preemptions.inc()

    def attempt_failed(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.attempt_failed`."""
        self._attempts.labels("failed").inc()
        self._handoffs.failed(attempt, error)

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.request_migrated`; one whose attempt failed was counted as that."""
        reason = failure_reason(error)
        self._migrations.labels(reason).inc()
        if reason == "worker_left":
            self._attempts.labels("migrated").inc()
            self._handoffs.cancelled(attempt, reason)

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_finished`."""
        self._attempts.labels("finished").inc()
        reason = attempt.finish_reason.value if attempt.finish_reason is not None else "stop"
        self._ends.labels(reason).inc()
        report = attempt.report()
        latency_s = attempt.last_token_at - attempt.arrived
        num_output = attempt.num_tokens - len(request.prompt_token_ids)
        decode_s = max(0.0, latency_s - report.ttft_s)
        self._prompt_size.observe(len(request.prompt_token_ids))
        self._max_tokens.observe(request.sampling.max_tokens or 1)
        self._output_size.observe(num_output)
        self._num_attempts.observe(report.attempts)
        self._latency_s.observe(latency_s)
        self._queue_s.observe(report.queue_s)
        self._prefill_s.observe(report.prefill_s)
        self._decode_s.observe(decode_s)
        self._inference_s.observe(max(0.0, latency_s - report.queue_s))
        if num_output > 1:
            self._tpot_s.observe(decode_s / (num_output - 1))

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """See `EngineObserver.request_cancelled`."""
        self._ends.labels("abort").inc()
        if attempt is not None:
            self._attempts.labels("cancelled").inc()
            self._handoffs.cancelled(attempt, "client_left")

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """See `EngineObserver.request_failed`."""
        name = error_name(error)
        self._ends.labels("error").inc()
        self._failures.labels(name).inc()
        if attempt is None and isinstance(error, _REFUSALS):
            self._refused.labels(name).inc()
