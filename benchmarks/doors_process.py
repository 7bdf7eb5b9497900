"""The two processes of `benchmarks.doors`: both doors over simulated workers, and clients of one of them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

from benchmarks.simulated_engine import start_simulated_engine
from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.generation.text_generation import Generation
from cluster.recall import SHIPPED_MODEL
from cluster.server.doors import Doors
from cluster.server.garbage_collector import settle
from cluster.text.tokenizer import Tokenizer
from workers.sampling_params import SamplingParams

_PROMPT = (5, 6, 7, 8)
_PREFILL_WORKERS = 32
"""So that prompts, one at a time on each, are not what streams wait for to begin."""


async def serve(streams: int, step_s: float) -> None:
    """Serve until standard input ends; each line of it is answered with the processor seconds spent so far."""
    engine, info = await start_simulated_engine(streams, step_s, _PREFILL_WORKERS, ServingEngine)
    doors = Doors(load_config(environ={}, overrides={"server.port": 0, "server.default_timeout_s": 3600}).server)
    await doors.open()
    await doors.serve(Generation(engine, Tokenizer.load(SHIPPED_MODEL), info), engine, info)
    settle()
    print(json.dumps({"grpc": doors.address, "http": doors.http_url}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"cpu_s": time.process_time()}), flush=True)
    await doors.stop(grace_s=0)
    await engine.stop()


class Counts:
    """What the clients have received."""

    def __init__(self) -> None:
        self.tokens = self.messages = self.failures = self.begun = 0


async def _grpc_stream(client: AsyncBatonClient, length: int, seed: int, counts: Counts) -> None:
    """One answer after the other, each by a call."""
    begun = False
    while True:
        try:
            sampling = SamplingParams(max_tokens=length, seed=seed)
            async for chunk in client.generate(token_ids=_PROMPT, sampling=sampling):
                counts.begun, begun = counts.begun + (not begun), True
                counts.messages += 1
                counts.tokens += len(chunk.token_ids)
        except BatonClientError:
            counts.failures += 1


async def _http_stream(url: str, length: int, seed: int, counts: Counts) -> None:
    """The same by HTTP on a connection of its own: a client that only looks for events and their ends.

    What an event says is not parsed: the client's time is not what is measured, and should not be what is waited for.
    """
    where = urlsplit(url)
    body = {"prompt": list(_PROMPT), "max_tokens": length, "seed": seed, "stream": True, "return_token_ids": True}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    begun = False
    while True:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if not status:
            return  # the server is gone
        counts.failures += b" 200 " not in status
        over = False
        while not over:
            line = await reader.readline()
            if line.startswith(b"data: {"):
                counts.begun, begun = counts.begun + (not begun), True
                counts.messages += 1
                ids = line[line.rindex(b'"token_ids":[') + 13 : line.rindex(b"]")]
                counts.tokens += ids.count(b",") + bool(ids)
            over = line == b"0\r\n" or not line
        await reader.readline()


async def read_streams(door: str, address: str, streams: int, length: int) -> None:
    """Keep so many streams open; each line of standard input is answered with what has been received so far."""
    counts = Counts()
    client = AsyncBatonClient(Connection(address)) if door == "grpc" else None
    lengths = [max(1, length - seed % 7) for seed in range(streams)]
    tasks = [
        asyncio.create_task(
            _http_stream(address, each, seed, counts) if client is None else _grpc_stream(client, each, seed, counts)
        )
        for seed, each in enumerate(lengths)
    ]
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(vars(counts)), flush=True)
    for task in tasks:
        task.cancel()
    if client is not None:
        await client.close()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "server":
        asyncio.run(serve(int(arguments[0]), float(arguments[1])))
    else:
        asyncio.run(read_streams(arguments[0], arguments[1], int(arguments[2]), int(arguments[3])))
