"""The answer to one request: from the tokens of its samples to parts of text."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.api import PolledStream, TokenStream, Usage
from cluster.generation.prompt_positions import PromptPosition
from cluster.generation.sample_parts import by_sample
from cluster.generation.text_assembler import TextAssembler
from cluster.generation.text_chunk import TextChunk
from workers.messages import PromptLogprobs, TokenOutput

Positions = tuple[PromptPosition, ...]


class Parts(Protocol):
    """An answer as it comes."""

    def __aiter__(self) -> AsyncIterator[TextChunk]:
        """Its parts in order, the last one with its usage."""
        ...

    async def aclose(self) -> None:
        """Cancel what is still under way."""
        ...

    def listen(self, reader: Callable[[], None]) -> bool:
        """Call this when there may be a part to `poll`, while the iterator waits; False: parts cannot be polled."""
        ...

    def poll(self) -> TextChunk | None:
        """A part that is here, unless it is the last one or takes more than its tokens; None: there is none."""
        ...

    def fail(self, error: Exception) -> None:
        """Have the iterator raise this: whoever polls cannot go on."""
        ...


class Answer:
    """The parts of one answer, or of several samples: an asynchronous iterator that may be polled, see `Parts`.

    Closing it, or leaving it by an exception, cancels the request.

    Args:
        stream: the tokens.
        texts: of each sample.
        num_prompt: tokens of the prompt.
        positions: makes log-probabilities of a prompt what clients are shown.
    """

    def __init__(
        self,
        stream: TokenStream,
        texts: Mapping[int, TextAssembler],
        num_prompt: int,
        positions: Callable[[PromptLogprobs], Awaitable[Positions]],
    ) -> None:
        self._stream = stream
        self._chunks = aiter(stream)
        self._polled = stream if isinstance(stream, PolledStream) and len(texts) == 1 else None
        self._texts = dict(texts)
        self._only = self._texts[0] if len(texts) == 1 and 0 in texts else None
        self._num_prompt = num_prompt
        self._make_positions = positions
        self._positions: Positions | None = None
        self._parts: deque[TextChunk] = deque()
        self._last = TextChunk("")
        self._num_tokens, self._stopped, self._over = 0, False, False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> TextChunk:
        while not self._parts:
            if self._over:
                raise StopAsyncIteration
            try:
                await self._go_on()
            except BaseException:
                await self.aclose()
                raise
        return self._parts.popleft()

    async def aclose(self) -> None:
        """See `Parts.aclose`."""
        self._over = True
        await self._stream.aclose()

    def listen(self, reader: Callable[[], None]) -> bool:
        """See `Parts.listen`."""
        if self._polled is None:
            return False
        self._polled.listen(reader)
        return True

    def poll(self) -> TextChunk | None:
        """See `Parts.poll`."""
        if self._polled is None or self._only is None or self._parts or not self._texts:
            return None
        tokens = self._polled.poll()
        if not tokens:
            return None
        part = self._only.push(tokens)
        if self._only.finish_reason is None:
            return part
        self._end(0, self._only, part)
        self._polled.wake()
        return None

    def fail(self, error: Exception) -> None:
        """See `Parts.fail`."""
        if self._polled is not None:
            self._polled.fail(error)

    async def _go_on(self) -> None:
        """Wait for tokens, and make parts of them."""
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            raise RuntimeError("the engine ended a request without a finish reason") from None
        if chunk.prompt_logprobs is not None:
            self._positions = await self._make_positions(chunk.prompt_logprobs)
        for index, tokens in by_sample(chunk.tokens):
            self._push(index, tokens)
        if self._texts:
            return
        if self._stopped:
            self._stream.complete()
        report = await self._stream.report()
        await self.aclose()  # what is still on its way nobody wants
        usage = Usage(prompt_tokens=self._num_prompt, completion_tokens=self._num_tokens)
        self._parts.append(replace(self._last, usage=usage, report=report))

    def _push(self, index: int, tokens: Sequence[TokenOutput]) -> None:
        if (text := self._texts.get(index)) is None:
            return  # a stop string was found before
        part = text.push(tokens)
        if index or self._positions is not None:
            part, self._positions = replace(part, index=index, prompt_logprobs=self._positions), None
        if text.finish_reason is None:
            self._parts.append(part)
            return
        self._end(index, text, part)
        if self._texts:
            if text.stopped:
                self._stream.drop(index)
            self._parts.append(self._last)

    def _end(self, index: int, text: TextAssembler, part: TextChunk) -> None:
        """A sample has ended with this part."""
        del self._texts[index]
        self._num_tokens, self._stopped = self._num_tokens + text.num_tokens, text.stopped
        self._last = replace(text.end(part), finish_reason=text.finish_reason, stop_reason=text.stop_reason)
