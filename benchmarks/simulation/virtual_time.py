"""An event loop whose clock jumps to the next thing that is due: hours pass as fast as they can be computed."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Lets the time pass instead of waiting for it."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> Any:
        self._advance(timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time starts at 0. Whatever sleeps or times out on this loop does so in its time; threads and sockets do not fit.

    Raises:
        RuntimeError: from `run_until_complete`, when everything waits and nothing is due: it would wait forever.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self._pass))

    def time(self) -> float:
        """Seconds since the start."""
        return self._now

    def _pass(self, seconds: float | None) -> None:
        if seconds is None:
            raise RuntimeError(f"everything waits and nothing is due, at {self._now:.3f} s of simulated time")
        self._now += seconds


def run_simulated(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in simulated time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
