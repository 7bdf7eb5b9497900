"""A service in an event loop of a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_S = 120.0


@contextlib.contextmanager
def running_in_thread(service: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """What the service gives when it has started; it is stopped at the end of the block."""
    opened: Future[T] = Future()
    closing: Future[Callable[[], None]] = Future()

    async def serve() -> None:
        async with service() as given:
            close = asyncio.Event()
            loop = asyncio.get_running_loop()
            closing.set_result(lambda: loop.call_soon_threadsafe(close.set))
            opened.set_result(given)
            await close.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield opened.result(_PATIENCE_S)
    finally:
        if closing.done():
            closing.result()()
        thread.join(_PATIENCE_S)
