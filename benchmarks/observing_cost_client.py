"""The clients of `benchmarks.observing_cost`, in a process of their own."""

from __future__ import annotations

import asyncio
import json
import sys

from cluster.client.client import AsyncBatonClient, Connection
from workers.sampling_params import SamplingParams


async def _read(client: AsyncBatonClient, number: int, longest: int) -> tuple[int, int]:
    """One answer: its tokens, and the messages that they came in."""
    length, tokens, messages = longest - number % 7, 0, 0
    sampling = SamplingParams(max_tokens=length, seed=length)
    async for chunk in client.generate(token_ids=(5, 6, 7, 8), sampling=sampling):
        tokens += len(chunk.token_ids)
        messages += 1
    return tokens, messages


async def main(address: str, streams: int, longest: int) -> None:
    """For each line of standard input send so many requests at once, and answer when all are done."""
    async with AsyncBatonClient(Connection(address)) as client:
        while await asyncio.to_thread(sys.stdin.readline):
            batch = (_read(client, number, longest) for number in range(streams))
            answers = await asyncio.gather(*batch, return_exceptions=True)
            done = [answer for answer in answers if isinstance(answer, tuple)]
            tokens, messages = (sum(answer[i] for answer in done) for i in range(2))
            counts = {"tokens": tokens, "messages": messages, "failures": streams - len(done)}
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
