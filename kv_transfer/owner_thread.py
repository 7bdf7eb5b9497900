"""The one thread that owns a transport: it runs what it is told, and looks at the network."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kv_transfer.errors import KVTransferError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ACTIVE_POLL_S = 0.0002
_IDLE_POLL_S = 0.005
_IDLE_AFTER_S = 0.02
_STOP_PATIENCE_S = 4.0
"""One whose lease is over stands still; it ends with its process."""


def _nothing() -> None:
    """The command to do nothing but look."""


def _end() -> None:
    """The command to end the thread; recognised by identity."""


class OwnerThread:
    """Looks at the network often while something is under way, seldom when nothing is, and at once after a command.

    Without a thread commands wait until `run_commands` is called, and errors go to its caller.

    Args:
        look: looks once, after `run_commands`; says whether more is expected soon.
        close: called at the end, where the transport lives.
        threaded: whether there is a thread.
    """

    def __init__(self, look: Callable[[], bool], close: Callable[[], None], *, threaded: bool) -> None:
        self._look = look
        self._close = close
        self._threaded = threaded
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Start the thread, if there is to be one."""
        if self._threaded:
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End it, and close the transport.

        Raises:
            KVTransferError: it did not end in time: the transport may still be used.
        """
        if (thread := self._thread) is not None:
            self._thread = None
            self._commands.put(_end)
            thread.join(timeout=_STOP_PATIENCE_S)
            if thread.is_alive():
                raise KVTransferError(f"the KV connector did not end within {_STOP_PATIENCE_S:g} s")
        elif not self._threaded:
            self._close()

    def post(self, command: Callable[[], None]) -> None:
        """Have a command run; returns at once."""
        self._commands.put(command)

    def call(self, command: Callable[[], T], timeout_s: float = 60.0) -> T:
        """Run a command where the transport lives, and wait for what it returns or raises.

        Raises:
            KVTransferError: the thread does not run, or did not answer in time.
        """
        if not self._threaded:
            return command()
        if self._thread is None:
            raise KVTransferError("the KV connector is not running")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            raise KVTransferError(f"the KV connector did not answer within {timeout_s:g} s") from error

    def run_commands(self) -> None:
        """Run what was posted before the call."""
        for _ in range(self._commands.qsize()):
            command = self._commands.get_nowait()
            if command is _end:
                self._commands.put(_end)  # for the thread's loop to see
                break
            self.attempt(command)

    def attempt(self, action: Callable[[], None]) -> None:
        """Run a command or take a message; on the thread one that fails does not take others with it."""
        try:
            action()
        except Exception:
            if not self._threaded:
                raise
            logger.exception("the KV connector goes on after an unexpected error")

    def _run(self) -> None:
        command = self._commands.get()  # the registration: before it there is nothing to poll
        last_active = 0.0
        failing = False
        while command is not _end:
            self.attempt(command)
            try:
                active = self._look()
                failing = False
            except Exception:
                if not failing:  # a broken network would fail at every look
                    logger.exception("the KV connector goes on after an unexpected error")
                active, failing = False, True
            now = time.monotonic()
            last_active = now if active else last_active
            patience = _ACTIVE_POLL_S if now - last_active < _IDLE_AFTER_S else _IDLE_POLL_S
            try:
                command = self._commands.get(timeout=patience)
            except queue.Empty:
                command = _nothing
        self._close()
