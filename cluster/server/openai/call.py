"""A call that takes its time: under its deadline, through the gate, and only as long as its client is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster import trace_context
from cluster.errors import ShuttingDownError
from cluster.server.openai import sse
from cluster.server.openai.door import Door
from cluster.server.openai.errors import answer_of
from cluster.server.openai.json_bytes import json_bytes
from cluster.server.unread import Writing
from workers.errors import DeadlineExceededError, RequestCancelledError

Headers = list[tuple[bytes, bytes]]
_LAST_WORDS_S = 5.0
_EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Call(Response):
    """An answer that is still to be found.

    Args:
        door: whose gate it passes, and whose deadline it has.
        request_id: goes into a header.
    """

    def __init__(self, door: Door, request_id: str) -> None:
        super().__init__()
        self._door = door
        self._own_headers: Headers = [(b"x-request-id", request_id.encode("ascii", "backslashreplace"))]
        self._begun = self._ended = False
        self._writing: Writing | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the answer, and send it or what went wrong."""
        trace_context.accept((name.decode("latin-1"), value) for name, value in scope["headers"])
        try:
            await self._governed(receive, send)
        except RequestCancelledError:
            return  # nobody is there to read an answer
        except Exception as error:
            answer = answer_of(error)
            if self._begun:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WORDS_S):  # who has not read will not read this either
                        await self._end(send, self._last_event(answer.body()))
                return
            response = answer.response()
            response.raw_headers.extend(self._own_headers)
            await response(scope, receive, send)

    async def _governed(self, receive: Receive, send: Send) -> None:
        """Do the work; its deadline, the end of the server and a client that goes away end it early."""
        timeout_s, gone = self._door.default_timeout_s, False
        deadline = asyncio.timeout(timeout_s)

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = not self._ended  # an answer that is whole is followed by this message, too
            if gone and not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())

        watching: asyncio.Task[None] | None = None
        try:
            async with deadline:
                with self._door.gate.passage(deadline), self._door.unread.stream(deadline) as writing:
                    self._writing = writing
                    watching = asyncio.create_task(watch())
                    await self._work(timeout_s, send)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if gone:
                raise RequestCancelledError("the client is gone") from error
            if self._writing is not None and self._writing.late:
                raise DeadlineExceededError(f"the answer was not read for {self._door.unread.limit_s:g} s") from error
            if self._door.gate.was_ended(deadline):
                raise ShuttingDownError(
                    "the service is shutting down: the request was not finished in the time that was left"
                ) from error
            raise DeadlineExceededError(f"not finished within the deadline of {timeout_s:.3g} s") from error
        finally:
            if watching is not None:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching

    async def _work(self, timeout_s: float, send: Send) -> None:
        raise NotImplementedError

    def _last_event(self, error: dict[str, Any]) -> bytes:
        """What ends an answer that has begun, and cannot be whole."""
        raise NotImplementedError

    async def _begin(self, send: Send, status: int, headers: Headers) -> None:
        self._begun = True
        await send({"type": "http.response.start", "status": status, "headers": [*headers, *self._own_headers]})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        """Send a part; that takes as long as the client lets it."""
        if self._writing is not None:
            self._writing.since = asyncio.get_running_loop().time()
        await send(message)
        if self._writing is not None:
            self._writing.since = 0.0

    async def _end(self, send: Send, content: bytes) -> None:
        self._ended = True
        await self._send(send, _body(content))


class WholeCall(Call):
    """An answer in one piece.

    Args:
        door: see `Call`.
        request_id: see `Call`.
        work: finds the answer's JSON within so many seconds.
    """

    def __init__(self, door: Door, request_id: str, work: Callable[[float], Awaitable[Any]]) -> None:
        super().__init__(door, request_id)
        self._find = work

    def _last_event(self, error: dict[str, Any]) -> bytes:
        return b""  # the client sees that the answer is not whole

    async def _work(self, timeout_s: float, send: Send) -> None:
        content = json_bytes(await self._find(timeout_s))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self._begin(send, 200, headers)
        await self._end(send, content)


class StreamCall(Call):
    """An answer event by event.

    Nothing is sent before the first event is there, so that what is refused has its HTTP status; what goes wrong later
    is an event.

    Args:
        door: see `Call`.
        request_id: see `Call`.
        events: the events of an answer that is found within so many seconds, each whole, the last one included.
        failure: makes an event of an error object; None: the event is as those of completions are.
    """

    def __init__(
        self,
        door: Door,
        request_id: str,
        events: Callable[[float], AsyncGenerator[bytes, None]],
        failure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(door, request_id)
        self._events = events
        self._failure = failure

    def _last_event(self, error: dict[str, Any]) -> bytes:
        if self._failure is not None:
            return sse.named_event(self._failure(error["error"]))
        return sse.event(error) + sse.DONE

    async def _work(self, timeout_s: float, send: Send) -> None:
        turn = self._door.pacer.turn
        async with aclosing(self._events(timeout_s)) as events:
            async for event in events:
                if not self._begun:
                    await self._begin(send, 200, _EVENT_STREAM)
                await self._send(send, _body(event, more=True))
                await turn()
        await self._end(send, b"")


def _body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}
