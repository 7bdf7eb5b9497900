"""A service that is looked at: its metrics, its last minutes, and the answers to those who ask for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.api import ModelInfo
from cluster.gateway.engine import ServingEngine
from cluster.gateway.readiness import Readiness
from cluster.generation.text_generation import Generation
from cluster.live.answers import Answers
from cluster.live.history import LiveHistory, Objectives
from cluster.live.snapshot import sample
from cluster.metrics.event_loop import watch_event_loop
from cluster.metrics.registry import MetricsRegistry, Names
from cluster.metrics.service import observe_service

_SAMPLE_S = 1.0


@dataclass(frozen=True)
class Observed:
    """What there is to ask.

    Attributes:
        metrics: every metric.
        history: of the last minutes.
        answers: to HTTP requests; any server may carry them.
    """

    metrics: MetricsRegistry
    history: LiveHistory
    answers: Answers


@contextlib.asynccontextmanager
async def observed(
    engine: ServingEngine,
    generation: Generation,
    model: ModelInfo,
    readiness: Readiness,
    objectives: Objectives,
    names: Names = "baton",
) -> AsyncIterator[Observed]:
    """Look at a running service until the block ends.

    Args:
        engine: the service's.
        generation: the service's.
        model: the served one.
        readiness: the service's.
        objectives: what counts as good.
        names: whose prefix metrics have that vLLM has, too.
    """
    metrics = observe_service(engine, model.name, model.max_model_len, names)
    history = LiveHistory(objectives)
    engine.observe(history)
    tasks = [asyncio.create_task(watch_event_loop(metrics)), asyncio.create_task(_sample(engine, history))]
    try:
        yield Observed(metrics, history, Answers(engine, generation, model, readiness, history, metrics))
    finally:
        for task in tasks:
            task.cancel()


async def _sample(engine: ServingEngine, history: LiveHistory) -> None:
    while True:
        sample(engine, history)
        await asyncio.sleep(_SAMPLE_S)
