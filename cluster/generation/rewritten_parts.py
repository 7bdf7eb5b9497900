"""Parts of an answer as others: those of one sample as those of several, and each with what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from cluster.generation.answer import Parts
from cluster.generation.conversations import AnswerReader
from cluster.generation.text_chunk import TextChunk
from workers.messages import FinishReason


class Copied:
    """The parts of one sample as those of so many, the first of which tells of the prompt, the last what all cost.

    Args:
        parts: of the one.
        copies: how many, at least 2.
    """

    def __init__(self, parts: Parts, copies: int) -> None:
        self._parts, self._copies = parts, copies
        self._chunks = aiter(parts)
        self._ready: deque[TextChunk] = deque()

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        return self

    async def __anext__(self) -> TextChunk:
        if not self._ready:
            self._ready.extend(self._copies_of(await anext(self._chunks)))
        return self._ready.popleft()

    async def aclose(self) -> None:
        """See `Parts.aclose`."""
        await self._parts.aclose()

    def listen(self, reader: Callable[[], None]) -> bool:
        """See `Parts.listen`; several parts that come at once cannot be polled."""
        return False

    def poll(self) -> TextChunk | None:
        """See `Parts.poll`."""
        return None

    def fail(self, error: Exception) -> None:
        """See `Parts.fail`."""
        self._parts.fail(error)

    def _copies_of(self, chunk: TextChunk) -> list[TextChunk]:
        last = replace(chunk, prompt_logprobs=None, index=self._copies - 1)
        if chunk.usage is not None:
            usage = replace(chunk.usage, completion_tokens=chunk.usage.completion_tokens * self._copies)
            last = replace(last, usage=usage)
        first = replace(chunk, usage=None, report=None)
        others = [replace(first, index=index, prompt_logprobs=None) for index in range(1, self._copies - 1)]
        return [first, *others, last]


class TakenApart:
    """The parts of answers, each with what it says.

    Args:
        parts: of the answers.
        readers: one for each sample.
    """

    def __init__(self, parts: Parts, readers: Sequence[AnswerReader]) -> None:
        self._parts, self._readers = parts, readers
        self._chunks = aiter(parts)

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        return self

    async def __anext__(self) -> TextChunk:
        return self._read(await anext(self._chunks))

    async def aclose(self) -> None:
        """See `Parts.aclose`."""
        await self._parts.aclose()

    def listen(self, reader: Callable[[], None]) -> bool:
        """See `Parts.listen`."""
        return self._parts.listen(reader)

    def poll(self) -> TextChunk | None:
        """See `Parts.poll`."""
        chunk = self._parts.poll()
        return None if chunk is None else self._read(chunk)

    def fail(self, error: Exception) -> None:
        """See `Parts.fail`."""
        self._parts.fail(error)

    def _read(self, chunk: TextChunk) -> TextChunk:
        reader = self._readers[chunk.index]
        deltas = reader.read(chunk.text, chunk.markers, ended=chunk.finish_reason is not None)
        reason = chunk.finish_reason
        if reason is FinishReason.STOP and reader.calls_tools:
            reason = FinishReason.TOOL_CALLS
        return replace(chunk, deltas=deltas, finish_reason=reason)
