"""Workers' leases, renewed from a thread of its own: that the loop which serves clients stands still ends no worker."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from cluster.worker_handle import HEARTBEAT_S

logger = logging.getLogger(__name__)

Renew = Callable[[float | None], "Future[float]"]
"""Tells a rank that something was heard of it that it said then, by its clock (None: nothing yet); it says when now is.

May be called by any thread, and does not wait.
"""


class LeaseKeeper:
    """Hears of each rank once a heartbeat, and tells it the next time what it has heard.

    So a rank's lease follows from its own words, as in Gray and Cheriton: one whose words are not heard is not renewed,
    and neither is one that was released. The thread is there while something is kept.

    Args:
        interval_s: between two looks.
    """

    def __init__(self, interval_s: float = HEARTBEAT_S) -> None:
        self._interval_s = interval_s
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, name: str, renew: Renew) -> None:
        """Renew a rank's lease from now on."""
        with self._lock:
            self._kept[name] = _Kept(renew)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()
        self._wake.set()

    def release(self, name: str) -> None:
        """No more of it; one that is not kept is no matter."""
        with self._lock:
            self._kept.pop(name, None)
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                if not self._kept:
                    self._thread = None
                    return
                kept = list(self._kept.values())
            for each in kept:
                each.look()
            self._wake.wait(self._interval_s)


class _Kept:
    """One rank's lease. Used by the keeper's thread only."""

    def __init__(self, renew: Renew) -> None:
        self._renew = renew
        self._said_at: float | None = None
        self._under_way: Future[float] | None = None

    def look(self) -> None:
        """Take what it has said, and tell it so; one that has not answered yet is waited for."""
        if self._under_way is not None:
            if not self._under_way.done():
                return
            with contextlib.suppress(Exception):  # who looks after the worker finds out why
                self._said_at = self._under_way.result()
        try:
            self._under_way = self._renew(self._said_at)
        except Exception:
            self._under_way = None
            logger.debug("a lease could not be renewed", exc_info=True)
