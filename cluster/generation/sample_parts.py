"""What comes of several samples together, told apart: tokens by their sample, and parts of answers by what they say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

from cluster.generation.conversations import AnswerReader
from cluster.generation.text_chunk import TextChunk
from workers.messages import FinishReason, TokenOutput


def by_sample(tokens: Sequence[TokenOutput]) -> Iterable[tuple[int, Sequence[TokenOutput]]]:
    """The tokens of each sample, in order."""
    if all(token.index == tokens[0].index for token in tokens):
        return [(tokens[0].index, tokens)] if tokens else []
    samples: dict[int, list[TokenOutput]] = {}
    for token in tokens:
        samples.setdefault(token.index, []).append(token)
    return samples.items()


async def copied(chunks: AsyncGenerator[TextChunk, None], copies: int) -> AsyncGenerator[TextChunk, None]:
    """The parts of one sample as those of so many, the first of which tells of the prompt, the last what all cost."""
    async with aclosing(chunks):
        async for chunk in chunks:
            last = replace(chunk, prompt_logprobs=None)
            if chunk.usage is not None:
                last = replace(
                    last, usage=replace(chunk.usage, completion_tokens=chunk.usage.completion_tokens * copies)
                )
            yield replace(chunk, usage=None, report=None)
            for index in range(1, copies - 1):
                yield replace(chunk, index=index, usage=None, report=None, prompt_logprobs=None)
            yield replace(last, index=copies - 1)


async def taken_apart(
    chunks: AsyncGenerator[TextChunk, None], readers: Sequence[AnswerReader]
) -> AsyncGenerator[TextChunk, None]:
    """The parts of answers, each with what it says; there is a reader for each sample."""
    async with aclosing(chunks):
        async for chunk in chunks:
            reader = readers[chunk.index]
            deltas = reader.read(chunk.text, chunk.markers, ended=chunk.finish_reason is not None)
            reason = chunk.finish_reason
            if reason is FinishReason.STOP and reader.calls_tools:
                reason = FinishReason.TOOL_CALLS
            yield replace(chunk, deltas=deltas, finish_reason=reason)
