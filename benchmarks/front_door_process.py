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
from cluster.client.client import AsyncBatonClient, Connection
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


async def read_answers(address: str, streams: int, longest: int) -> None:
    """For each line of standard input send so many requests at once, and answer when all are done."""

    async def read(client: AsyncBatonClient, number: int) -> tuple[int, int]:
        tokens = messages = 0
        length = longest - number % 7
        sampling = SamplingParams(max_tokens=length, seed=length)
        async for chunk in client.generate(token_ids=_PROMPT, sampling=sampling):
            messages += 1
            tokens += len(chunk.token_ids)
        return tokens, messages

    client = AsyncBatonClient(Connection(address))
    while await asyncio.to_thread(sys.stdin.readline):
        answers = await asyncio.gather(*(read(client, number) for number in range(streams)), return_exceptions=True)
        done = [answer for answer in answers if isinstance(answer, tuple)]
        tokens, messages = (sum(answer[i] for answer in done) for i in range(2))
        print(json.dumps({"tokens": tokens, "messages": messages, "failures": streams - len(done)}), flush=True)
    await client.close()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        asyncio.run(serve(int(arguments[0]), float(arguments[1])))
    else:
        asyncio.run(read_answers(arguments[0], int(arguments[1]), int(arguments[2])))
