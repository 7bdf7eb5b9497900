"""The clients of `benchmarks.front_door`: answers that are read one after the other, or very many calls at once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterable

import grpc

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from protos import baton_pb2
from workers.sampling_params import SamplingParams

_PROMPT = (5, 6, 7, 8)


class Counts:
    """What the clients have received."""

    def __init__(self) -> None:
        self.tokens = self.messages = self.failures = self.begun = 0


async def _stream(client: AsyncBatonClient, first: int, longest: int, counts: Counts) -> None:
    """One answer after the other; the first one is short, so that streams end at different times."""
    length, begun = first, False
    while True:
        try:
            async for chunk in client.generate(
                token_ids=_PROMPT, sampling=SamplingParams(max_tokens=length, seed=length)
            ):
                counts.begun, begun = counts.begun + (not begun), True
                counts.messages += 1
                counts.tokens += len(chunk.token_ids)
        except BatonClientError:
            counts.failures += 1
        length = longest


async def read_streams(address: str, streams: int, longest: int) -> None:
    """Keep so many streams open; each line of standard input is answered with what has been received so far."""
    counts = Counts()
    async with AsyncBatonClient(Connection(address)) as client:
        lengths = [2 + longest * number // streams for number in range(streams)]
        tasks = [asyncio.create_task(_stream(client, length, longest, counts)) for length in lengths]
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(vars(counts)), flush=True)
        for task in tasks:
            task.cancel()


async def _end_of(call: AsyncIterable[bytes]) -> str:
    """The status that a call ends in, and whether it is our queue that says so."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        ours = "the service is at capacity" in str(error.details())
        return f"{error.code().name}{', by our queue' if ours else ''}"
    return "OK"


async def call_at_once(address: str, calls: int) -> None:
    """For each line of standard input make so many calls at once, and answer with how many ended in which status."""
    method = f"/{baton_pb2.DESCRIPTOR.services_by_name['Baton'].full_name}/Generate"
    request = baton_pb2.GenerateRequest(token_ids=baton_pb2.TokenIds(ids=_PROMPT))
    request.sampling.max_tokens = 1  # which a prefill worker says alone
    while await asyncio.to_thread(sys.stdin.readline):
        async with grpc.aio.insecure_channel(address) as channel:
            generate = channel.unary_stream(method, request_serializer=baton_pb2.GenerateRequest.SerializeToString)
            ends = Counter(await asyncio.gather(*(_end_of(generate(request)) for _ in range(calls))))
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "streams":
        asyncio.run(read_streams(arguments[0], int(arguments[1]), int(arguments[2])))
    else:
        asyncio.run(call_at_once(arguments[0], int(arguments[1])))
