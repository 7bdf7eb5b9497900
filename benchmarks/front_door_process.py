"""The two processes of `benchmarks.front_door`: a server over simulated workers, and clients that read its streams.

Run as a file with PYTHONPATH set to the tree that is measured, so that trees of different commits can be compared.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from functools import partial
from typing import Any

import grpc

from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.workers import SimulatedWorker
from cluster.api import ModelInfo
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.gateway.text_generation import Generation
from cluster.recall import SHIPPED_MODEL
from cluster.server.grpc.serve import start_server
from cluster.text.tokenizer import Tokenizer
from protos import baton_pb2, baton_pb2_grpc
from workers.runner.step_times import StepTimes

_PROMPT = (5, 6, 7, 8)
_CONTEXT = 131_072


async def serve(streams: int, step_s: float) -> None:
    """Serve until standard input ends; each line of it is answered with the processor seconds spent so far."""
    times = StepTimes(prefill=((1, 1e-4), (1000, 1e-4)), decode=((1, step_s), (streams, step_s)))
    hardware = Hardware(
        times, num_blocks=64 * streams, max_num_seqs=2 * streams, steps_at_once=1, kv_bytes_per_token=1, load_s=0.0
    )
    fabric: dict[str, SimulatedWorker] = {}
    places = {role: [partial(SimulatedWorker, f"{role}-0", role, hardware, fabric)] for role in ("prefill", "decode")}
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
    print(json.dumps({"address": server.address, "grpcio": grpc.__version__}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"cpu_s": time.process_time()}), flush=True)
    await server.stop(grace_s=0)
    await engine.stop()


async def read_streams(address: str, streams: int) -> None:
    """Keep so many streams open; each line of standard input is answered with what has been received so far."""
    counts: dict[str, int] = dict.fromkeys(("tokens", "messages", "failures", "begun"), 0)
    channels = [
        grpc.aio.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) for _ in range(min(8, streams))
    ]

    async def read(channel: Any, seed: int) -> None:
        stub, begun = baton_pb2_grpc.BatonStub(channel), False
        while True:
            request = baton_pb2.GenerateRequest(token_ids=baton_pb2.TokenIds(ids=_PROMPT))
            request.sampling.max_tokens, request.sampling.seed = 3000, 3000 + seed % 7
            try:
                async for message in stub.Generate(request):
                    counts["begun"] += not begun
                    begun = True
                    counts["messages"] += 1
                    counts["tokens"] += len(message.token_ids)
            except grpc.aio.AioRpcError:
                counts["failures"] += 1

    tasks = [
        asyncio.create_task(read(channel, seed))
        for seed, channel in zip(range(streams), itertools.cycle(channels), strict=False)
    ]
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(counts), flush=True)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        asyncio.run(serve(int(arguments[0]), float(arguments[1])))
    else:
        asyncio.run(read_streams(arguments[0], int(arguments[1])))
