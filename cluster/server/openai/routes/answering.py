"""How completions and chats are answered: the same requests to the engine, written by different writers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from cluster.api import EngineRequest
from cluster.generation.conversations import Conversation
from cluster.generation.text_chunk import TextChunk
from cluster.generation.text_generation import Generation
from cluster.generation.whole_answer import held_bytes
from cluster.server.openai import sse
from cluster.server.openai.answers.parts import joined
from cluster.server.openai.answers.usage import UsageCount
from cluster.server.openai.requests.sampling import StreamOptions
from cluster.server.openai.samples import generate_samples


class Writer(Protocol):
    """Writes answers as an endpoint has them."""

    def whole(self, choices: Sequence[TextChunk], usage: UsageCount) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def part(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """What a part of the answer of this number is in events."""
        ...

    def last(self, usage: UsageCount) -> dict[str, Any]:
        """The event with the usage."""
        ...


async def answer(
    generation: Generation,
    requests: Sequence[EngineRequest],
    n: int,
    writer: Writer,
    chat: Conversation | None = None,
) -> dict[str, Any]:
    """Answer every prompt, or the one of a conversation, `n` times, in one piece."""
    usage = usage_of(requests)
    choices: list[list[TextChunk]] = [[] for _ in range(len(requests) * n)]
    async with aclosing(generate_samples(generation, requests, n, chat)) as samples:
        async for sample in samples:
            choices[sample.index].append(sample.chunk)
            usage.add(sample.chunk)

    def whole() -> dict[str, Any]:
        return writer.whole([joined(chunks) for chunks in choices], usage)

    return await generation.intake.run(sum(map(held_bytes, choices)), whole)


async def stream(
    generation: Generation,
    requests: Sequence[EngineRequest],
    n: int,
    writer: Writer,
    options: StreamOptions,
    chat: Conversation | None = None,
) -> AsyncGenerator[bytes, None]:
    """Answer every prompt, or the one of a conversation, `n` times, event by event."""
    usage = usage_of(requests)
    always, at_end = bool(options.continuous_usage_stats), bool(options.include_usage)
    async with aclosing(generate_samples(generation, requests, n, chat)) as samples:
        async for sample in samples:
            usage.add(sample.chunk)
            events = writer.part(sample.index, sample.chunk)
            if at_end:
                shown = usage.completion() if always else None
                events = [{**event, "usage": shown} for event in events]
            if events:
                yield b"".join(map(sse.event, events))
    yield (sse.event(writer.last(usage)) if at_end else b"") + sse.DONE


def usage_of(requests: Sequence[EngineRequest]) -> UsageCount:
    """Nothing is generated yet."""
    return UsageCount(len(request.prompt_token_ids) for request in requests)
