"""What the observers themselves cost, call by call: what other work on the machine hardly touches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from cluster.api import EngineRequest
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver, Observers
from cluster.live.history import LiveHistory, Objectives
from cluster.metrics.registry import MetricsRegistry
from cluster.metrics.requests import RequestMetrics
from cluster.routing.types import Placement
from cluster.tracing.exporting import otlp_targets
from cluster.tracing.observer import TraceRequests
from workers.messages import DecodeReport, HandoffReport, PrefillReport
from workers.sampling_params import SamplingParams

_TOKENS, _STREAMS, _REQUESTS, _REPEATS = 2048, 32, 100, 40
_TRACE_REPEATS = 12
_PREFILL = PrefillReport("r", 0.001, 0.1, 1, 0, attempt_id="a")
_HANDOFF = HandoffReport("r", 1_000_000, 8, 0.01, 0.001, attempt_id="a")
_DECODE = DecodeReport("r", 0.01, 0, attempt_id="a")


def call_costs() -> dict[str, tuple[float, float]]:
    """By what looks: microseconds for each token, and for each request besides; the best of many. Needs a loop."""
    observers: dict[str, list[EngineObserver]] = {
        "metrics": [RequestMetrics(MetricsRegistry("m", 4096))],
        "metrics and page": [RequestMetrics(MetricsRegistry("m", 4096)), LiveHistory(Objectives())],
    }
    return {name: _costs(Observers(each)) for name, each in observers.items()}


def _costs(observers: Observers) -> tuple[float, float]:
    attempt = _attempt()

    def tokens() -> None:
        for _ in range(_TOKENS // _STREAMS):
            observers.tokens_received([(attempt, 1, 0.01)] * _STREAMS)

    def requests() -> None:
        for request in made:
            _tell(observers, request)

    made = [_request() for _ in range(_REQUESTS)]
    return _best(tokens) / _TOKENS, _best(requests) / _REQUESTS


def _tell(observers: Observers, request: EngineRequest) -> None:
    """All that is told of a request but for its tokens."""
    attempt = _attempt()
    observers.request_arrived(request)
    observers.router_decided(request, Placement("prefill-0.1", "decode-0.1", 0.1, 0.01), 1e-4)
    observers.request_placed(request, attempt)
    observers.first_token(attempt)
    observers.prefill_reported(attempt, _PREFILL)
    observers.handoff_reported(attempt, _HANDOFF)
    observers.decode_reported(attempt, _DECODE)
    observers.request_finished(request, attempt)


def _best(work: Callable[[], None]) -> float:
    """Microseconds."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best * 1e6


def _request() -> EngineRequest:
    sampling = SamplingParams(max_tokens=200, seed=0)
    return EngineRequest(
        request_id="r", sampling=sampling, timeout_s=1.0, prompt_token_ids=np.zeros(100, dtype=np.int32)
    )


def _attempt() -> Attempt:
    attempt = Attempt("a", "prefill-0.1", "decode-0.1", 300, 0.0, 1)
    attempt.first_token_at = attempt.last_token_at = 1.0
    return attempt


async def trace_cost(collector: str) -> float:
    """Microseconds of processor time for the traces of a request, made and sent to a collector; the best of many."""
    targets, costs = otlp_targets(collector, 1.0, "baton"), []
    observers = Observers([TraceRequests(targets)])
    for _ in range(_TRACE_REPEATS):
        made = [_request() for _ in range(_REQUESTS)]
        began = time.process_time()
        for request in made:
            _tell(observers, request)
        await asyncio.to_thread(targets.flush)
        costs.append(time.process_time() - began)
    targets.close()
    return min(costs) / _REQUESTS * 1e6
