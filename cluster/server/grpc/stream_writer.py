"""Writes one call's stream of messages: parts of an answer at once, as they come, and all else when it is told to.

A part is written in the pass of the event loop in which its worker's step came, and no task is woken for it, neither to
write it nor when it is written. What comes while a message is on its way goes in the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from cluster.generation.answer import Parts
from cluster.generation.text_chunk import TextChunk
from cluster.server.pacing import Pacer
from cluster.server.unread import Writing


class StreamWriter:
    """One call's; to be made in the task that answers it.

    Args:
        context: the call's.
        writing: is told when a message is on its way.
        pacer: of the server's streams.
    """

    def __init__(self, context: grpc.aio.ServicerContext, writing: Writing, pacer: Pacer) -> None:
        self._write = context.write
        self._writing, self._pacer = writing, pacer
        self._now = asyncio.get_running_loop().time
        self._task = asyncio.current_task()
        self._parts: Parts | None = None
        self._encode: Callable[[TextChunk], bytes] | None = None
        self._on_its_way: Coroutine[Any, Any, None] | None = None
        self._waits_for_turn = False
        self._missed = False
        self._sent: asyncio.Future[None] | None = None

    def follow(self, parts: Parts, encode: Callable[[TextChunk], bytes]) -> None:
        """Write what can be polled of these parts, as `encode` says; the task iterates them, and writes the rest."""
        if parts.listen(self._look):
            self._parts, self._encode = parts, encode

    async def write(self, message: bytes) -> None:
        """Write a message behind those that are on their way.

        Raises:
            Exception: what gRPC raises.
        """
        while self._on_its_way is not None:
            self._sent = asyncio.get_running_loop().create_future()
            await self._sent
        self._writing.since = self._now()
        await self._write(message)
        self._writing.since = 0.0

    def _look(self) -> None:
        """Begin to write what is there, unless something is on its way or the streams wait for each other's tokens."""
        if self._on_its_way is not None or self._waits_for_turn:
            self._missed = True
            return
        if self._parts is None or self._encode is None:
            return
        if (part := self._parts.poll()) is None:
            return
        writing = self._write(self._encode(part))
        self._writing.since = self._now()
        # The coroutine is driven by hand: it hands the message to gRPC, and waits for this future alone.
        done: asyncio.Future[None] = writing.send(None)
        self._on_its_way = writing
        done.add_done_callback(self._on_written)

    def _on_written(self, done: asyncio.Future[None]) -> None:
        writing, self._on_its_way = self._on_its_way, None
        self._writing.since = 0.0
        try:
            if writing is not None:
                writing.send(None)
        except StopIteration:
            pass
        except Exception:
            # The client is gone, and gRPC says so by cancelling the task; that it does is not relied on.
            self._parts = None
            if self._task is not None:
                self._task.cancel()
            return
        if self._sent is not None:
            if not self._sent.done():
                self._sent.set_result(None)
            self._sent = None
            return
        if self._pacer.at_turn(self._on_turn):
            self._waits_for_turn = True
        elif self._missed:
            self._go_on()

    def _on_turn(self) -> None:
        self._waits_for_turn = False
        if self._missed:
            self._go_on()

    def _go_on(self) -> None:
        self._missed = False
        try:
            self._look()
        except Exception as error:
            if self._parts is not None:
                self._parts.fail(error)
