"""A service's metrics, put together: what observes it, what reads it, what asks the event loop."""

from __future__ import annotations

from cluster.gateway.engine import ServingEngine
from cluster.metrics.registry import MetricsRegistry, Names
from cluster.metrics.requests import RequestMetrics
from cluster.metrics.workers import WorkerLosses, WorkerMetrics


def observe_service(engine: ServingEngine, model_name: str, max_model_len: int, names: Names) -> MetricsRegistry:
    """Have everything about a service counted from now on; see `watch_event_loop` for what is not of the engine.

    Args:
        engine: the service's.
        model_name: the served model's.
        max_model_len: context window, tokens.
        names: whose prefix metrics have that vLLM has, too.
    """
    registry = MetricsRegistry(model_name, max_model_len, names)
    engine.observe(RequestMetrics(registry))
    engine.observe(WorkerLosses(registry))
    registry.register(WorkerMetrics(registry, engine))
    return registry
