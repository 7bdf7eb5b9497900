"""Ctrl-C while a load is on: what was measured by then is kept."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator

from benchmarks.load import LoadRun, OnRow
from benchmarks.measure import Clock, Row


async def load_until_interrupted(
    load: Callable[[OnRow], Awaitable[LoadRun]], clock: Clock, on_row: OnRow = lambda row: None
) -> LoadRun:
    """Put a load on until it ends, or until Ctrl-C, which cancels the requests under way. A second one ends all.

    Args:
        load: puts it on, and tells what it is given of each request that has ended.
        clock: that the load goes by.
        on_row: is told as well.
    """
    rows: list[Row] = []
    started = clock.now()

    def tell(row: Row) -> None:
        rows.append(row)
        on_row(row)

    loading = asyncio.ensure_future(load(tell))
    interrupted = asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        loading.cancel()

    with _on_interrupt(interrupt):
        try:
            return await loading
        except asyncio.CancelledError:
            if not interrupted.is_set():
                raise
    return LoadRun(tuple(sorted(rows, key=lambda row: row.index)), clock.now() - started, interrupted=True)


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Have the first SIGINT in the block call this. Outside the main thread nothing can, and nothing does."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)

    def release() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)

    def first() -> None:
        release()
        act()

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (ValueError, RuntimeError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            release()
