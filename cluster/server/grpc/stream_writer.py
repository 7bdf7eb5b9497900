"""Writes one call's stream of messages: parts of an answer at once, as they come, and all else when it is told to.

A part is written in the pass of the event loop in which its worker's step came, and no task is woken for it, neither to
write it nor when it is written. What comes while a message is on its way goes in the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from time import monotonic
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
        writing: is told what is on its way.
        pacer: of the server's streams.
    """

    def __init__(self, context: grpc.aio.ServicerContext, writing: Writing, pacer: Pacer) -> None:
        self._write = context.write
        self._writing, self._pacer = writing, pacer
        self._task = asyncio.current_task()
        self._parts: Parts | None = None
        self._encode: Callable[[TextChunk], bytes] | None = None
        self._on_its_way: Coroutine[Any, Any, None] | None = None
        self._sent: asyncio.Future[None] | None = None
        self._waits_for_turn = False
        self._missed = False

    def follow(self, parts: Parts, encode: Callable[[TextChunk], bytes]) -> None:
        """Write what can be polled of these parts, as `encode` says; the task iterates them, and writes the rest."""
        if parts.listen(self._look):
            self._parts, self._encode = parts, encode

    async def write(self, message: bytes) -> None:
        """Write a message behind the one that is on its way.

        Raises:
            Exception: what gRPC raises.
        """
        if self._sent is not None:
            await asyncio.wait((self._sent,))
            self._settle()
        writing = self._writing
        writing.sent, writing.since = None, monotonic()
        await self._write(message)
        writing.since = 0.0

    def close(self) -> None:
        """Nothing more is written; what is on its way goes on."""
        self._parts = self._task = None
        if self._sent is not None and not self._sent.done():
            self._sent.add_done_callback(lambda _: self._settle())
        elif self._sent is not None:
            self._settle()

    def _look(self) -> None:
        """Begin to write what is there, unless something is on its way or the streams wait for each other's tokens.

        Where nothing is missed, nobody is called when a message is sent: whoever writes the next one finds that it is.
        """
        if self._sent is not None:
            if not self._sent.done():
                if not self._missed:
                    self._missed = True
                    self._sent.add_done_callback(self._on_sent)
                return
            self._settle()
        if self._waits_for_turn:
            self._missed = True
            return
        if self._parts is None or self._encode is None or (part := self._parts.poll()) is None:
            return
        self._on_its_way = writing = self._write(self._encode(part))
        # The coroutine is driven by hand: it hands the message to gRPC, and waits for this future alone.
        self._writing.sent = self._sent = writing.send(None)
        self._writing.since = monotonic()
        if not self._pacer.looks:
            self._pacer.wake()
        if self._pacer.interval_s:
            self._waits_for_turn = True
            self._pacer.at_turn(self._on_turn)

    def _settle(self) -> None:
        """The message has been sent, or could not be."""
        writing, self._on_its_way, self._sent = self._on_its_way, None, None
        try:
            if writing is not None:
                writing.send(None)
        except StopIteration:
            return
        except Exception:
            # The client is gone, and gRPC says so by cancelling the task; that it does is not relied on.
            self._parts = None
            if self._task is not None:
                self._task.cancel()

    def _on_sent(self, _: asyncio.Future[None]) -> None:
        if not self._waits_for_turn:
            self._look_again()

    def _on_turn(self) -> None:
        self._waits_for_turn = False
        if self._missed:
            self._look_again()

    def _look_again(self) -> None:
        self._missed = False
        try:
            self._look()
        except Exception as error:
            if self._parts is not None:
                self._parts.fail(error)
