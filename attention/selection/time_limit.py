"""An end to work that nobody has time to wait for: kernel libraries compile for minutes when their caches are cold."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitError(Exception):
    """The work in a `time_limit` block took too long."""


@contextmanager
def time_limit(seconds: float, again_s: float = 1.0) -> Iterator[None]:
    """Interrupt this block after so long, by the operating system's alarm (POSIX, the main thread).

    A compiler that Python waits for is ended with it; a call into a library ends first. Whoever swallows the
    exception meets it again every `again_s`. On other threads, and where there is no alarm, the block runs to its end.

    Args:
        seconds: above 0.
        again_s: seconds.

    Raises:
        TimeLimitError: in the block, wherever it is then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    working = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if working:
            raise TimeLimitError(f"took more than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, again_s)
        try:
            yield
        finally:
            working = False  # an alarm that comes just here is the block's, and the one that clears up is not disturbed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
