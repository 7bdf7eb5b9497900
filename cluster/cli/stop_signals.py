"""SIGINT, SIGTERM and SIGHUP as two events: stop when the work is done, and stop now."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """The first signal asks for a stop that waits for what is under way, the second for one that does not.

    After the second, or after `release`, the process has its own handlers again, so that one more ends it whatever it
    does. A terminal that closes may send SIGHUP several times: that counts once. SIGHUP stays ignored where it was
    ignored at the start, as under nohup.

    Attributes:
        at_once: set by the second signal.

    Args:
        on_request: called by the first signal; may be replaced until it comes.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.on_request = on_request
        self.at_once = asyncio.Event()
        self._requested = False
        self._loop = asyncio.get_running_loop()
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._numbers = _NUMBERS[:2] if ignored else _NUMBERS

    def take(self) -> None:
        """Listen from now on; again, if something else may have put its own handlers in place."""
        for number in self._numbers:
            self._loop.add_signal_handler(number, self._on_signal, number)

    def release(self) -> None:
        """Listen no more: the next signal ends the process."""
        for number in self._numbers:
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if not self._requested:
            self._requested = True
            self.on_request()
        elif number != signal.SIGHUP:
            self.release()
            self.at_once.set()
