"""Who looks at a service, as its configuration says: a line a request, traces, metrics and the last minutes."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from cluster.api import ModelInfo
from cluster.config.schema import MetricsConfig, ServiceConfig, TracingConfig
from cluster.gateway.engine import ServingEngine
from cluster.gateway.observers import EngineObserver
from cluster.gateway.readiness import Readiness
from cluster.gateway.request_lines import RequestLines
from cluster.generation.text_generation import Generation
from cluster.live.history import Objectives
from cluster.live.observed import Observed, observed
from cluster.logs.setup import REQUESTS
from cluster.metrics.registry import Names
from cluster.text.tokenizer import Tokenizer


def request_observers(
    config: ServiceConfig, tokenizer: Tokenizer, stack: contextlib.AsyncExitStack
) -> list[EngineObserver]:
    """Those of single requests; they have said all when the stack has ended.

    Raises:
        ConfigError: traces are wanted, and OpenTelemetry is not installed.
    """
    observers: list[EngineObserver] = []
    if config.logging.requests or config.logging.prompts:
        observers.append(_request_lines(config, tokenizer))
    if config.tracing.enabled:
        observers.append(_traces(config.tracing, stack))
    return observers


async def observe(
    config: MetricsConfig,
    stack: contextlib.AsyncExitStack,
    engine: ServingEngine,
    generation: Generation,
    info: ModelInfo,
    readiness: Readiness,
) -> Observed | None:
    """Have the service looked at until the stack ends; None: that is not wanted."""
    if not config.enabled:
        return None
    objectives = Objectives(config.good_ttft_s, config.good_itl_s)
    names: Names = "vllm" if config.names == "vllm" else "baton"
    return await stack.enter_async_context(observed(engine, generation, info, readiness, objectives, names))


def _request_lines(config: ServiceConfig, tokenizer: Tokenizer) -> RequestLines:
    """What logs each request at its end, whatever level the rest is logged at."""
    lines = logging.getLogger(REQUESTS)
    lines.setLevel(logging.INFO)
    decode = (lambda prompt: tokenizer.decode(prompt.tolist())) if config.logging.prompts else None
    return RequestLines(lines, decode)


def _traces(config: TracingConfig, stack: contextlib.AsyncExitStack) -> EngineObserver:
    """What traces requests, and sends what is left when the stack ends."""
    from cluster.tracing.exporting import otlp_targets

    targets = otlp_targets(config.endpoint, config.sample, config.service_name)
    stack.push_async_callback(asyncio.to_thread, targets.close)
    from cluster.tracing.observer import TraceRequests  # it needs what `otlp_targets` has found

    return TraceRequests(targets)
