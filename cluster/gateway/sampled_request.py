"""One request of several samples under way.

Its samples are one attempt, whose prompt is computed and handed over once. If a worker is lost, or leaves, when some of
them have tokens, each that has not ended goes on by itself, from its own tokens: samples that are done are not begun
again, and a prefix cache spares most of the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from cluster.api import EngineRequest, RequestReport, TokenChunk
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from cluster.gateway.request import AttemptStarter, Continued, RunningRequest, SamplesPartError
from workers.messages import FinishReason


class SampledRequest:
    """An asynchronous iterator of `TokenChunk`s, whose tokens say of which sample they are.

    Closing it, or leaving it by an exception, cancels all of its samples.

    Args:
        attempts: where they begin and end.
        request: with more than one sample.
        observers: told what happens; of the request once, however many attempts and samples there are.
    """

    def __init__(self, attempts: AttemptStarter, request: EngineRequest, observers: EngineObserver) -> None:
        self._starter = attempts
        self._request = request
        self._observers = observers
        self._whole = RunningRequest(attempts, request, _AttemptEvents(observers))
        self._parts: _Parts | None = None
        self._outputs: dict[int, list[int]] = {index: [] for index in range(request.sampling.n)}
        self._over = False

    def __aiter__(self) -> SampledRequest:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._over:
            raise StopAsyncIteration
        try:
            chunk = await self._next_chunk()
        except Exception as error:
            if not self._over:
                self._over = True
                self._observers.request_failed(self._request, self._attempt, error)
            await self._close()
            raise
        except BaseException:
            await self.aclose()
            raise
        for token in chunk.tokens:
            if token.index in self._outputs:
                self._outputs[token.index].append(token.token_id)
                if token.finish_reason is not None:
                    del self._outputs[token.index]
        if not self._outputs and not self._over and self._attempt is not None:
            self._over = True
            self._observers.request_finished(self._request, self._attempt)
        return chunk

    def drop(self, index: int) -> None:
        """Nobody wants the rest of this sample; see `TokenStream.drop`."""
        if len(self._outputs) < 2 or self._outputs.pop(index, None) is None:
            return
        if self._parts is None:
            self._whole.drop(index)
        else:
            self._parts.drop(index)

    def complete(self) -> None:
        """Every sample has ended, the last one by a stop string; see `TokenStream.complete`."""
        if not self._over and (attempt := self._attempt) is not None:
            self._over = True
            attempt.finish_reason = FinishReason.STOP
            self._observers.request_finished(self._request, attempt)

    async def aclose(self) -> None:
        """Cancel what is under way."""
        if not self._over:
            self._over = True
            self._observers.request_cancelled(self._request, self._attempt)
        await self._close()

    async def report(self) -> RequestReport:
        """Where the request went and where its time went, as far as it is known.

        Of samples that had to go on by themselves: where the first of them went, and all bytes that were moved since.

        Raises:
            RuntimeError: it has not been placed yet.
        """
        whole = await self._whole.report()
        reports = [] if self._parts is None else await self._parts.reports()
        if not reports:
            return whole
        return replace(
            reports[0],
            queue_s=whole.queue_s,
            prefill_s=whole.prefill_s,
            ttft_s=whole.ttft_s,
            kv_bytes=sum(report.kv_bytes for report in reports),
            attempts=max(report.attempts for report in reports),
        )

    @property
    def _attempt(self) -> Attempt | None:
        """The one that observers are told of: of the samples together, or of the first that goes on by itself."""
        own = None if self._parts is None else self._parts.attempt
        return own or self._whole.attempt

    async def _next_chunk(self) -> TokenChunk:
        if self._parts is None:
            try:
                return await anext(self._whole)
            except SamplesPartError:
                self._parts = _Parts({index: self._alone(index) for index in self._outputs})
        return await self._parts.next_chunk()

    def _alone(self, index: int) -> RunningRequest:
        """A sample as a request of its own, which goes on where it is."""
        sampling = replace(self._request.sampling.of_sample(index), prompt_logprobs=None)
        request = replace(self._request, sampling=sampling)
        whole = self._whole
        so_far = Continued(self._outputs[index], whole.arrived, whole.num_attempts, whole.avoid)
        return RunningRequest(self._starter, request, _AttemptEvents(self._observers), so_far)

    async def _close(self) -> None:
        if self._parts is not None:
            await self._parts.close()
        await self._whole.aclose()


class _Parts:
    """Samples that go on each by itself: their streams in one.

    Args:
        requests: of each sample.
    """

    def __init__(self, requests: dict[int, RunningRequest]) -> None:
        self._requests = requests
        self._chunks: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()
        self._tasks = {
            index: asyncio.create_task(self._read(index, request), name=f"sample {index}")
            for index, request in requests.items()
        }

    @property
    def attempt(self) -> Attempt | None:
        """Of the first of them that has been placed."""
        return next((request.attempt for request in self._requests.values() if request.attempt is not None), None)

    async def next_chunk(self) -> TokenChunk:
        """The tokens of all of them that have come since the last call, at least one.

        Raises:
            Exception: why one of them has failed.
        """
        chunks = [await self._chunks.get()]
        while not self._chunks.empty():
            chunks.append(self._chunks.get_nowait())
        if errors := [chunk for chunk in chunks if isinstance(chunk, Exception)]:
            raise errors[0]
        return TokenChunk(tuple(token for chunk in chunks if isinstance(chunk, TokenChunk) for token in chunk.tokens))

    def drop(self, index: int) -> None:
        """Nobody wants the rest of this one."""
        self._tasks[index].cancel()

    async def reports(self) -> Sequence[RequestReport]:
        """Of those that have been placed."""
        return [await request.report() for request in self._requests.values() if request.attempt is not None]

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _read(self, index: int, request: RunningRequest) -> None:
        async with aclosing(request):
            try:
                async for chunk in request:
                    self._chunks.put_nowait(TokenChunk(tuple(replace(token, index=index) for token in chunk.tokens)))
            except Exception as error:
                self._chunks.put_nowait(error)


class _AttemptEvents(EngineObserver):
    """Passes on what happens to attempts, and not what becomes of a request, which is one of several.

    Args:
        observers: told.
    """

    def __init__(self, observers: EngineObserver) -> None:
        self._observers = observers

    def attempt_failed(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.attempt_failed`."""
        self._observers.attempt_failed(attempt, error)

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.request_migrated`."""
        self._observers.request_migrated(attempt, error)
