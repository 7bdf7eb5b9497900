"""Requests on their way to a worker: one whose grammar is not compiled waits, while the worker's thread goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from workers.errors import BatonError
from workers.grammars.compiler import GrammarCompiler
from workers.messages import WorkerRequest
from workers.structured_output import StructuredOutput


class GrammarIntake:
    """Compiles on a thread of its own what the worker will ask for, then lets the request pass. From any thread.

    Args:
        grammars: the worker's.
        submit: gives the worker a request; called on the caller's thread where nothing is to be compiled.
    """

    def __init__(self, grammars: GrammarCompiler, submit: Callable[[WorkerRequest], None]) -> None:
        self._grammars = grammars
        self._submit = submit
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def submit(self, request: WorkerRequest) -> None:
        """Let a request pass, now or when its grammar is compiled, or is known to be none."""
        wanted = request.sampling.structured_output
        if wanted is None or self._grammars.has(wanted):
            self._submit(request)
            return
        with self._lock:
            self._waiting.add(request.attempt_id)
        self._executor.submit(self._compile, request, wanted, time.monotonic())

    def abort(self, attempt_id: str) -> None:
        """If the request waits here, it does not pass any more."""
        with self._lock:
            self._waiting.discard(attempt_id)

    def close(self) -> None:
        """Let nothing pass any more."""
        with self._lock:
            self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, request: WorkerRequest, wanted: StructuredOutput, since: float) -> None:
        with suppress(BatonError):  # the worker refuses it, with the same words
            self._grammars.compile(wanted)
        left = request.timeout_s - (time.monotonic() - since)
        with self._lock:
            if request.attempt_id in self._waiting:
                self._waiting.remove(request.attempt_id)
                self._submit(replace(request, timeout_s=left))
