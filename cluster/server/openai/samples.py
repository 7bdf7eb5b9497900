"""Several answers at once: to several prompts, and several to each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.api import EngineRequest
from cluster.generation.conversations import Conversation
from cluster.generation.text_chunk import TextChunk
from cluster.generation.text_generation import Generation

_BUFFERED = 4
"""Parts of each answer that may wait for those of others."""


@dataclass(frozen=True)
class SampleChunk:
    """A part of one of the answers, which are numbered: those to the first prompt first."""

    index: int
    chunk: TextChunk


async def generate_samples(
    generation: Generation, requests: Sequence[EngineRequest], n: int, chat: Conversation | None = None
) -> AsyncGenerator[SampleChunk, None]:
    """Answer every prompt, or the one of a conversation, `n` times; parts come as they are there.

    Closing the generator cancels all. Each request has `n` samples.

    Raises:
        BatonError: what the engine raises of the first request that fails, which ends the others.
    """
    if len(requests) == 1:
        async with aclosing(_answers(generation, requests[0], chat)) as parts:
            async for part in parts:
                yield part
        return
    queue: asyncio.Queue[SampleChunk | BaseException | None] = asyncio.Queue(_BUFFERED * len(requests) * n)
    tasks = [
        asyncio.create_task(_put(generation, request, chat, number * n, queue))
        for number, request in enumerate(requests)
    ]
    try:
        left = len(tasks)
        while left:
            put = await queue.get()
            if isinstance(put, BaseException):
                raise put
            if put is None:
                left -= 1
            else:
                yield put
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put(
    generation: Generation,
    request: EngineRequest,
    chat: Conversation | None,
    first: int,
    queue: asyncio.Queue[SampleChunk | BaseException | None],
) -> None:
    """Put the answers to one prompt, of which the first has this number, and None behind them."""
    try:
        async with aclosing(_answers(generation, request, chat)) as parts:
            async for part in parts:
                await queue.put(replace(part, index=first + part.index))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


async def _answers(
    generation: Generation, request: EngineRequest, chat: Conversation | None
) -> AsyncGenerator[SampleChunk, None]:
    """The answers to one prompt."""
    async with aclosing(generation.run(request, chat)) as chunks:
        async for chunk in chunks:
            yield SampleChunk(chunk.index, chunk)
