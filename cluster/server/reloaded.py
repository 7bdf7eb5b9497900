"""What is read from files, and again when they change."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from workers.errors import ConfigError

T = TypeVar("T")

LOOK_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


class Reloaded(Generic[T]):
    """The content of files, as it was when they were last all right.

    May be called by any thread. Files are looked at once a second at most, and only when somebody asks. A change that
    cannot be read (half written, a certificate whose key has not come yet) is said once and looked at again.

    Args:
        what: for the log.
        paths: the files; none: there is nothing to reload.
        read: reads them; raises ConfigError where they are wrong.
        clock: seconds.

    Raises:
        ConfigError: they are wrong at the start.
    """

    def __init__(
        self, what: str, paths: Sequence[str], read: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._state, self._wrong = self._look(), ""
        self._value = read()
        self._looked_at = clock()

    def __call__(self) -> T:
        """The content now."""
        if self._paths and self._clock() - self._looked_at >= LOOK_INTERVAL_S:
            with self._lock:
                self._looked_at = self._clock()
                self._refresh()
        return self._value

    def _refresh(self) -> None:
        state = self._look()
        if state == self._state:
            return
        try:
            self._value = self._read()
        except ConfigError as error:
            if str(error) != self._wrong:
                logger.warning("%s changed and cannot be used, the one before stays: %s", self._what, error)
            self._wrong = str(error)
            return
        self._state, self._wrong = state, ""
        logger.warning("%s changed and is used from now on", self._what)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_fingerprint, self._paths))


def _fingerprint(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written anew, replaced, or a link to it is turned elsewhere."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
