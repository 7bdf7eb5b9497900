"""The server of `benchmarks.observing_cost`: the real door and engine over simulated workers, looked at or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time

from benchmarks.simulated_engine import start_simulated_engine
from cluster.config.load import load_config
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

MODES = ("nothing", "metrics", "metrics and page", "log", "traces")
_PREFILL_WORKERS = 8


class _Unhurried(Pacer):
    """Every token is a message, however busy the machine is: else what a token costs would follow what others do."""

    def sample(self, busy: float) -> None:
        """See `Pacer.sample`."""


def _nothing() -> None:
    """There is nothing to be sent."""


async def serve(mode: str, streams: int, step_s: float, collector: str) -> None:
    """Serve until standard input ends; each line of it is answered with the processor seconds spent so far."""
    engine, info = await start_simulated_engine(streams, step_s, _PREFILL_WORKERS)
    config = load_config(environ={}, overrides={"server.port": 0, "metrics.port": 0})
    generation = Generation(engine, Tokenizer.load(SHIPPED_MODEL), info)
    async with contextlib.AsyncExitStack() as stack:
        page, flush = "", _nothing
        if mode == "metrics":
            observe_service(engine, info.name, info.max_model_len, "baton")
        elif mode == "metrics and page":
            seen = await stack.enter_async_context(observed(engine, generation, info, Readiness(engine), Objectives()))
            page = await stack.enter_async_context(serve_pages(config.metrics, 0, seen.answers))
        elif mode == "log":
            log_to_stderr("info", "json", "gateway")
            engine.observe(RequestLines(logging.getLogger("baton.requests")))
        elif mode == "traces":
            from cluster.tracing.exporting import otlp_targets
            from cluster.tracing.observer import TraceRequests

            targets = otlp_targets(collector, 1.0, "baton")
            engine.observe(TraceRequests(targets))
            flush = targets.flush
        server = await start_server(config.server, generation, engine, info, _Unhurried())
        settle()
        print(json.dumps({"address": server.address, "page": page}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            await asyncio.to_thread(flush)  # what a slice has begun belongs to it
            print(json.dumps({"cpu_s": time.process_time()}), flush=True)
        await server.stop(grace_s=0)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
