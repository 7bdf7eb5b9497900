"""Several answers at once: to several prompts, and several to each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.api import EngineRequest
from cluster.gateway.conversations import Conversation
from cluster.gateway.text_chunk import TextChunk
from cluster.gateway.text_generation import Generation

_BUFFERED = 4
"""Parts of each answer that may wait for those of others."""


@dataclass(frozen=True)
class SampleChunk:
    """A part of one of the answers, which are numbered: those to the first prompt first."""

    index: int
    chunk: TextChunk


def derived_seed(seed: int, sample: int) -> int:
    """The seed of a prompt's answer of this number: the request's plus the number, so that the first has its own."""
    return (seed + sample) % 2**64


async def generate_samples(
    generation: Generation, requests: Sequence[EngineRequest], n: int, chat: Conversation | None = None
) -> AsyncGenerator[SampleChunk, None]:
    """Answer every prompt, or the one of a conversation, `n` times; parts come as they are there.

    Closing the generator cancels all.

    Each answer is a request of its own, with a seed of its own; a prompt's blocks are found in prefix caches.

    Raises:
        BatonError: what the engine raises of the first answer that fails, which ends the others.
    """
    each = [_sample(request, number) for request in requests for number in range(n)]
    if len(each) == 1:
        async with aclosing(generation.run(each[0], chat)) as chunks:
            async for chunk in chunks:
                yield SampleChunk(0, chunk)
        return
    parts: asyncio.Queue[SampleChunk | BaseException | None] = asyncio.Queue(_BUFFERED * len(each))
    tasks = [asyncio.create_task(_put(generation, request, chat, index, parts)) for index, request in enumerate(each)]
    try:
        left = len(tasks)
        while left:
            part = await parts.get()
            if isinstance(part, BaseException):
                raise part
            if part is None:
                left -= 1
            else:
                yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put(
    generation: Generation,
    request: EngineRequest,
    chat: Conversation | None,
    index: int,
    parts: asyncio.Queue[SampleChunk | BaseException | None],
) -> None:
    try:
        async with aclosing(generation.run(request, chat)) as chunks:
            async for chunk in chunks:
                await parts.put(SampleChunk(index, chunk))
    except Exception as error:
        await parts.put(error)
    else:
        await parts.put(None)


def _sample(request: EngineRequest, number: int) -> EngineRequest:
    if number == 0:
        return request
    sampling = request.sampling
    assert sampling.seed is not None  # drawn when the request was made whole
    seed = derived_seed(sampling.seed, number)
    return replace(request, request_id=f"{request.request_id}-{number}", sampling=replace(sampling, seed=seed))
