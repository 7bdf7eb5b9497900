"""The loop: commands in order, output as it comes, sleep when idle, and one end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from threads import wait_for_the_end
from workers.errors import HandoffError
from workers.messages import CacheUpdate, Load, RequestFailed, StepOutput, TokenOutput, WorkerEvent
from workers.worker_loop import WorkerLoop

PATIENCE_S = 20.0


class CountingWorker:
    """Turns what it is given into tokens, one a step."""

    def __init__(self) -> None:
        self.todo: list[int] = []
        self.steps = 0
        self.threads: set[int] = set()
        self.blocked = False
        self.hangs = threading.Event()
        self.hangs.set()
        self.error: Exception | None = None
        self.failing: RequestFailed | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.todo) and not self.blocked

    @property
    def broken_peers(self) -> dict[str, str]:
        return {}

    @property
    def load(self) -> Load:
        return Load(8, 8 - len(self.todo), waiting=len(self.todo))

    def step(self) -> list[WorkerEvent]:
        self.steps += 1
        self.hangs.wait(PATIENCE_S)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        if self.failing is not None:
            failed, self.failing = self.failing, None
            return [failed]
        return [TokenOutput("r", self.todo.pop(0), attempt_id="r")] if self.has_work else []

    def take_cache_update(self) -> CacheUpdate | None:
        return None


class Running:
    """A started loop; everything it says is collected."""

    def __init__(self) -> None:
        self.worker = CountingWorker()
        self.outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.loop = WorkerLoop("w.1", self.worker, self.outputs.put, self.crashes.put)
        self.loop.start()

    def tokens(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            output = self.outputs.get(timeout=PATIENCE_S)
            assert output.engine_id == "w.1"
            found += [event.token_id for event in output.events if isinstance(event, TokenOutput)]
        return found

    def call(self, command: Callable[[CountingWorker], object]) -> object:
        """Run a command on the loop's thread and return what it returns."""
        answer: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.loop.post(lambda worker: answer.put(command(worker)))
        return answer.get(timeout=PATIENCE_S)


@pytest.fixture
def running():
    instance = Running()
    yield instance
    instance.loop.stop()


def test_commands_of_all_threads_run_in_order_on_one_thread(running):
    def send(first: int) -> None:
        for i in range(50):
            running.loop.post(lambda worker, n=first + i: worker.todo.append(n))

    senders = [threading.Thread(target=send, args=(first,)) for first in (0, 1000, 2000)]
    for sender in senders:
        sender.start()
    tokens = running.tokens(150)
    for first in (0, 1000, 2000):
        assert [t for t in tokens if first <= t < first + 1000] == list(range(first, first + 50))
    assert len(running.worker.threads) == 1
    assert running.worker.threads != {threading.get_ident()}


def test_the_load_is_told_when_it_changes_although_nothing_else_happened(running):
    running.call(lambda worker: setattr(worker, "blocked", True))
    running.loop.post(lambda worker: worker.todo.append(5))
    while (output := running.outputs.get(timeout=PATIENCE_S)).load == Load(8, 8):
        assert output.events == ()
    assert (output.events, output.load) == ((), Load(8, 7, waiting=1))


def test_a_step_that_hangs_is_told_by_the_heartbeat_and_an_idle_worker_takes_steps(running):
    def until(condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, running.loop.heartbeat()
            time.sleep(0.005)

    before = running.loop.heartbeat().num_steps
    until(lambda: running.loop.heartbeat().num_steps > before + 1)
    until(lambda: running.loop.heartbeat().step_s == 0.0)
    running.worker.hangs.clear()
    until(lambda: running.loop.heartbeat().step_s > 0.2)  # an idle worker waits for 0.05 s at most
    hanging = running.loop.heartbeat()
    until(lambda: running.loop.heartbeat().step_s > hanging.step_s + 0.1)
    assert running.loop.heartbeat().num_steps == hanging.num_steps
    running.worker.hangs.set()
    until(lambda: running.loop.heartbeat().num_steps > hanging.num_steps)
    until(lambda: running.loop.heartbeat().step_s == 0.0)


def test_an_idle_worker_is_still_looked_after(running):
    """Deadlines pass and peers speak while there is nothing to compute: steps go on, only seldom."""
    before = running.worker.steps
    give_up = time.monotonic() + PATIENCE_S
    while running.worker.steps < before + 3 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert running.worker.steps >= before + 3


def test_an_unexpected_error_ends_the_loop_and_is_told(running):
    error = RuntimeError("the device is gone")
    running.call(lambda worker: setattr(worker, "error", error))
    assert running.crashes.get(timeout=PATIENCE_S) is error
    running.loop.stop()
    steps = running.worker.steps
    running.loop.wake()
    assert running.worker.steps == steps


def test_a_failing_command_ends_the_loop_and_is_told(running):
    running.loop.post(lambda worker: 1 // 0)
    assert isinstance(running.crashes.get(timeout=PATIENCE_S), ZeroDivisionError)


def test_stopping_waits_for_the_step_and_ends_the_thread(running):
    running.loop.post(lambda worker: worker.todo.extend(range(1000)))
    running.tokens(1)
    running.loop.stop()
    assert "worker-w.1" not in [thread.name for thread in threading.enumerate()]
    assert running.crashes.empty()
    running.loop.stop()  # again does nothing


def test_stopping_from_its_own_thread_does_not_wait_for_itself(running):
    running.loop.post(lambda worker: running.loop.stop())
    wait_for_the_end("worker-w.1", PATIENCE_S)
    assert running.crashes.empty()


def test_a_request_that_fails_is_logged_by_its_clients_name_and_its_attempt(running, caplog):
    failed = RequestFailed("order-17", HandoffError("lost a part"), attempt_id="5f3a")
    running.call(lambda worker: setattr(worker, "failing", failed))
    while failed not in running.outputs.get(timeout=PATIENCE_S).events:
        pass
    assert "request order-17 (attempt 5f3a) failed on w.1: lost a part" in caplog.text
