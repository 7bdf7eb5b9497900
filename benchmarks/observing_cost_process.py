"""The server of `benchmarks.observing_cost`: the real door and engine over simulated workers, looked at or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from typing import Any

from benchmarks.simulated_engine import start_simulated_engine
from cluster.api import ModelInfo
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.gateway.observers import EngineObserver
from cluster.gateway.readiness import Readiness
from cluster.gateway.request_lines import RequestLines
from cluster.generation.text_generation import Generation
from cluster.live.history import Objectives
from cluster.live.observed import observed
from cluster.logs.setup import log_to_stderr
from cluster.metrics.service import observe_service
from cluster.recall import SHIPPED_MODEL
from cluster.server.garbage_collector import settle
from cluster.server.grpc.serve import start_server
from cluster.server.pacing import Pacer
from cluster.server.pages.serve import serve_pages
from cluster.text.tokenizer import Tokenizer
from cluster.tracing.exporting import otlp_targets
from cluster.tracing.observer import TraceRequests

MODES = ("nothing", "metrics", "metrics and page", "log", "traces")
_PREFILL_WORKERS = 8


class _Unhurried(Pacer):
    """Every token is a message, however busy the machine is: else what a token costs would follow what others do."""

    def sample(self, busy: float) -> None:
        """See `Pacer.sample`."""


class _Observed(ServingEngine):
    """An engine that knows who has begun to observe it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.added: list[EngineObserver] = []
        super().__init__(*args, **kwargs)

    def observe(self, observer: EngineObserver) -> None:
        """See `ServingEngine.observe`."""
        self.added.append(observer)
        super().observe(observer)

    def unobserved(self) -> None:
        """Whoever has been added since the start is told nothing more."""
        while self.added:
            self.dismiss(self.added.pop())


class _Ways:
    """The ways to look at one engine, of which one is in use at a time.

    All of them are in one process, so that they differ in nothing else.

    Attributes:
        page: where the page is, in the ways that have one; empty: none.
    """

    def __init__(self, engine: _Observed, generation: Generation, info: ModelInfo, collector: str) -> None:
        self._engine, self._generation, self._info = engine, generation, info
        self._targets = otlp_targets(collector, 1.0, "baton")
        self._metrics = load_config(environ={}, overrides={"metrics.port": 0}).metrics
        self._stack = contextlib.AsyncExitStack()
        self.page = ""

    async def change(self, mode: str) -> None:
        """Look in this way from now on."""
        await self._stack.aclose()
        self._engine.unobserved()
        engine, self.page = self._engine, ""
        self._stack = stack = contextlib.AsyncExitStack()
        if mode == "metrics":
            observe_service(engine, self._info.name, self._info.max_model_len, "baton")
        elif mode == "metrics and page":
            seen = await stack.enter_async_context(
                observed(engine, self._generation, self._info, Readiness(engine), Objectives())
            )
            self.page = await stack.enter_async_context(serve_pages(self._metrics, 0, seen.answers))
        elif mode == "log":
            engine.observe(RequestLines(logging.getLogger("baton.requests")))
        elif mode == "traces":
            engine.observe(TraceRequests(self._targets))

    async def flush(self) -> None:
        """What has begun is sent."""
        await asyncio.to_thread(self._targets.flush)


async def serve(streams: int, step_s: float, collector: str) -> None:
    """Serve until standard input ends.

    A line that names a way changes to it; every line is answered with the page's address and the processor seconds
    spent so far.
    """
    log_to_stderr("info", "json", "gateway")
    engine, info = await start_simulated_engine(streams, step_s, _PREFILL_WORKERS, make=_Observed)
    config = load_config(environ={}, overrides={"server.port": 0})
    generation = Generation(engine, Tokenizer.load(SHIPPED_MODEL), info)
    ways = _Ways(engine, generation, info, collector)
    server = await start_server(config.server, generation, engine, info, _Unhurried())
    settle()
    print(json.dumps({"address": server.address}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if mode := line.strip():
            await ways.change(mode)
        await ways.flush()  # what a slice has begun belongs to it
        print(json.dumps({"page": ways.page, "cpu_s": time.process_time()}), flush=True)
    await server.stop(grace_s=0)
    await ways.change("nothing")
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
