"""Gives a worker a thread: commands go in from any thread, each step's output comes out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from workers.heartbeat import Heartbeat
from workers.messages import (
    CacheUpdate,
    DecodeReport,
    HandoffReport,
    Load,
    PrefillReport,
    PromptLogprobs,
    RequestFailed,
    RequestPreempted,
    SpansReport,
    StepOutput,
    TokenOutput,
    WorkerEvent,
)

logger = logging.getLogger(__name__)

_HOUSEKEEPING_S = 0.05
_LOAD_REPORT_S = 1.0


class Worker(Protocol):
    """What `PrefillWorker` and `DecodeWorker` have in common."""

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        ...

    @property
    def load(self) -> Load:
        """The load now."""
        ...

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Engine ids to which the connection is broken."""
        ...

    def step(self) -> list[WorkerEvent]:
        """Do what is due."""
        ...

    def take_cache_update(self) -> CacheUpdate | None:
        """How its prefix cache has changed since the last call; None: not at all."""
        ...


W = TypeVar("W", bound=Worker)


class WorkerLoop(Generic[W]):
    """Runs a worker's steps on one thread for as long as there is work, and sleeps otherwise.

    Args:
        engine_id: of the worker, for its output.
        worker: touched by this thread only, once started.
        emit: takes each step's output, on the loop's thread; not called for a step with nothing to say, except that
            the load is told whenever it has changed, and every second.
        on_crash: told of an unexpected error; the loop has ended then.
    """

    def __init__(
        self,
        engine_id: str,
        worker: W,
        emit: Callable[[StepOutput], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._engine_id = engine_id
        self._worker = worker
        self._emit = emit
        self._on_crash = on_crash
        self._commands: queue.SimpleQueue[Callable[[W], None]] = queue.SimpleQueue()
        self._stopping = False
        self._num_steps = 0
        self._began: float | None = None  # the step under way
        self._last_load: Load | None = None
        self._last_report = 0.0
        self._thread = threading.Thread(target=self._run, name=f"worker-{engine_id}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, command: Callable[[W], None]) -> None:
        """Have a command run on the worker, in order, before its next step. From any thread."""
        self._commands.put(command)

    def wake(self) -> None:
        """Have the worker look at once. From any thread."""
        self._commands.put(_nothing)

    def heartbeat(self) -> Heartbeat:
        """How the steps get on. From any thread; it waits for nothing that a step may hold."""
        began = self._began
        return Heartbeat(self._num_steps, 0.0 if began is None else time.monotonic() - began)

    def stop(self) -> None:
        """End the thread after the current step and wait for it."""
        self._stopping = True
        self.wake()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._began = time.monotonic()
                self._take_commands()
                events = self._worker.step()
                self._report(events)
                self._num_steps += 1
        except BaseException as error:
            logger.exception("worker %s stops after an unexpected error", self._engine_id)
            self._on_crash(error)

    def _take_commands(self) -> None:
        """Run what is queued; if there is nothing else to do, wait for more, but not past the next housekeeping."""
        if not self._worker.has_work:
            self._began = None
            try:
                command = self._commands.get(timeout=_HOUSEKEEPING_S)
            except queue.Empty:
                return
            finally:
                self._began = time.monotonic()
            command(self._worker)
        for _ in range(self._commands.qsize()):
            self._commands.get_nowait()(self._worker)

    def _report(self, events: list[WorkerEvent]) -> None:
        load = self._worker.load
        cache_update = self._worker.take_cache_update()
        now = time.monotonic()
        if events or cache_update or load != self._last_load or now - self._last_report > _LOAD_REPORT_S:
            self._last_load, self._last_report = load, now
            self._log(events)
            self._emit(StepOutput(self._engine_id, tuple(events), load, cache_update, self._worker.broken_peers))

    def _log(self, events: list[WorkerEvent]) -> None:
        """What a log says of requests: which one it is, as its client calls it; of what goes well if it is to debug."""
        debugging = logger.isEnabledFor(logging.DEBUG)
        for event in events:
            if isinstance(event, TokenOutput) and (not debugging or event.finish_reason is None):
                continue
            if isinstance(event, RequestFailed) or debugging:
                names = {"request_id": event.request_id, "attempt_id": event.attempt_id, "engine_id": self._engine_id}
                level = logging.WARNING if isinstance(event, RequestFailed) else logging.DEBUG
                told = _told(event, self._engine_id)
                logger.log(level, "request %s (attempt %s) %s", event.request_id, event.attempt_id, told, extra=names)


def _told(event: WorkerEvent, engine_id: str) -> str:
    """What has happened, without what a client has said or is told."""
    match event:
        case RequestFailed():
            return f"failed on {engine_id}: {event.error}"
        case PrefillReport():
            return f"was computed on {engine_id} in {event.prefill_s * 1e3:.1f} ms and {event.num_chunks} steps"
        case HandoffReport():
            return f"was handed over by {engine_id}, {event.num_bytes} bytes in {event.transfer_s * 1e3:.1f} ms"
        case DecodeReport():
            return f"had its second token on {engine_id} {event.first_decode_s * 1e3:.1f} ms after its cache"
        case PromptLogprobs():
            return f"had its prompt's log-probabilities computed on {engine_id}"
        case SpansReport():
            return f"was traced on {engine_id}, {len(event.spans)} spans"
        case RequestPreempted():
            return f"made room for others on {engine_id}"
        case TokenOutput():
            return f"ended on {engine_id} ({event.finish_reason.value if event.finish_reason else 'it goes on'})"


def _nothing(worker: object) -> None:
    """The command that only wakes."""
