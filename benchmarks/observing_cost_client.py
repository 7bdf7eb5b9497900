"""The clients of `benchmarks.observing_cost`, in a process of their own."""

from __future__ import annotations

import asyncio
import json
import sys

from cluster.client.client import AsyncBatonClient, Connection
from workers.sampling_params import SamplingParams

_COUNTS = {"tokens": 0, "requests": 0}


async def _read(client: AsyncBatonClient, number: int, longest: int) -> None:
    """One answer after the other."""
    while True:
        length = longest - number % 7
        sampling = SamplingParams(max_tokens=length, seed=length)
        async for chunk in client.generate(token_ids=(5, 6, 7, 8), sampling=sampling):
            _COUNTS["tokens"] += len(chunk.token_ids)
        _COUNTS["requests"] += 1


async def main(address: str, streams: int, longest: int) -> None:
    """Keep so many streams open; each line of standard input is answered with what has been received so far."""
    client = AsyncBatonClient(Connection(address))
    tasks = [asyncio.create_task(_read(client, number, longest)) for number in range(streams)]
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(_COUNTS), flush=True)
    for task in tasks:
        task.cancel()
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
