"""The two processes of `benchmarks.front_door`: a server over simulated workers, and clients that read its streams.

Run as a file with PYTHONPATH set to the tree that is measured, so that trees of different commits can be compared.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from importlib.metadata import version

from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.workers import SimulatedWorker
from cluster.api import ModelInfo
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.recall import SHIPPED_MODEL
from cluster.server.grpc.serve import start_server
from cluster.text.tokenizer import Tokenizer
from workers.runner.step_times import StepTimes
from workers.sampling_params import SamplingParams

try:
    from cluster.generation.text_generation import Generation
except ImportError:  # a tree that has it beside the engine
    from cluster.gateway.text_generation import Generation  # type: ignore[import-not-found, no-redef]

_PROMPT = (5, 6, 7, 8)
_LONGEST = 3000
_PREFILL_WORKERS = 32
"""So that prompts, one at a time on each, are not what streams wait for to begin."""


async def serve(streams: int, step_s: float) -> None:
    """Serve until standard input ends; each line of it is answered with the processor seconds spent so far."""
    times = StepTimes(prefill=((1, 1e-4), (1000, 1e-4)), decode=((1, step_s), (streams, step_s)))
    hardware = Hardware(
        times, num_blocks=64 * streams, max_num_seqs=2 * streams, steps_at_once=1, kv_bytes_per_token=1, load_s=0.0
    )
    fabric: dict[str, SimulatedWorker] = {}
    places = {
        role: [partial(SimulatedWorker, f"{role}-{i}", role, hardware, fabric) for i in range(count)]
        for role, count in (("prefill", _PREFILL_WORKERS), ("decode", 1))
    }
    engine = ServingEngine(places["prefill"], places["decode"], max_queue=100_000)
    await engine.start()
    info = ModelInfo("simulated", "llama", "bfloat16", hardware.max_model_len, 4096, (), False)
    config = load_config(environ={}, overrides={"server.port": 0, "server.default_timeout_s": 3600}).server
    server = await start_server(config, Generation(engine, Tokenizer.load(SHIPPED_MODEL), info), engine, info)
    try:
        from cluster.server.garbage_collector import settle
    except ImportError:  # a tree that leaves the collector as Python starts it
        pass
    else:
        settle()
    print(json.dumps({"address": server.address, "grpcio": version("grpcio")}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"cpu_s": time.process_time()}), flush=True)
    await server.stop(grace_s=0)
    await engine.stop()


async def read_streams(address: str, streams: int) -> None:
    """Keep so many streams open; each line of standard input is answered with what has been received so far."""
    counts: dict[str, int] = dict.fromkeys(("tokens", "messages", "failures", "begun"), 0)

    async def read(client: AsyncBatonClient, seed: int) -> None:
        begun = False
        while True:
            sampling = SamplingParams(max_tokens=_LONGEST, seed=_LONGEST - seed % 7)
            try:
                async for chunk in client.generate(token_ids=_PROMPT, sampling=sampling):
                    counts["begun"] += not begun
                    begun = True
                    counts["messages"] += 1
                    counts["tokens"] += len(chunk.token_ids)
            except BatonClientError:
                counts["failures"] += 1

    client = AsyncBatonClient(Connection(address))
    tasks = [asyncio.create_task(read(client, seed)) for seed in range(streams)]
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(counts), flush=True)
    for task in tasks:
        task.cancel()
    await client.close()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        asyncio.run(serve(int(arguments[0]), float(arguments[1])))
    else:
        asyncio.run(read_streams(arguments[0], int(arguments[1])))
