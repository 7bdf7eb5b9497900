"""Requests wait for their grammar beside the worker's thread: nobody else waits, and who is stopped does not pass."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from made_requests import worker_request
from workers.errors import InvalidRequestError
from workers.grammars.intake import GrammarIntake
from workers.messages import WorkerRequest
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput

PATIENCE_S = 30.0


@dataclass
class SlowCompiler:
    """Compiles when it is allowed to."""

    allowed: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    known: set[StructuredOutput] = field(default_factory=set)

    def has(self, wanted: StructuredOutput) -> bool:
        return wanted in self.known

    def compile(self, wanted: StructuredOutput) -> None:
        self.begun.set()
        assert self.allowed.wait(PATIENCE_S)
        self.known.add(wanted)
        if wanted.text == "(":
            raise InvalidRequestError("no regex")


class Passed:
    """What has reached the worker."""

    def __init__(self) -> None:
        self.requests: list[WorkerRequest] = []
        self._came = threading.Condition()

    def __call__(self, request: WorkerRequest) -> None:
        with self._came:
            self.requests.append(request)
            self._came.notify_all()

    def wait(self, count: int) -> list[str]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, PATIENCE_S)
            return [request.request_id for request in self.requests]


@pytest.fixture
def compiler():
    compiler = SlowCompiler()
    yield compiler
    compiler.allowed.set()


@pytest.fixture
def passed() -> Passed:
    return Passed()


@pytest.fixture
def intake(compiler, passed):
    intake = GrammarIntake(compiler, passed)
    yield intake
    intake.close()


def asking(name: str, regex: str = "a+") -> WorkerRequest:
    return worker_request(name, [1], SamplingParams(seed=0, structured_output=StructuredOutput.regex(regex)))


def test_only_who_needs_a_grammar_waits_for_it(intake, compiler, passed) -> None:
    intake.submit(asking("form"))
    intake.submit(worker_request("free", [1]))
    assert compiler.begun.wait(PATIENCE_S)
    assert passed.wait(1) == ["free"]
    compiler.allowed.set()
    assert passed.wait(2) == ["free", "form"]
    assert 0 < passed.requests[1].timeout_s < 60.0, "waiting was part of its time"
    intake.submit(asking("again"))
    assert passed.wait(3)[-1] == "again", "it is known"


def test_who_is_stopped_meanwhile_does_not_pass(intake, compiler, passed) -> None:
    intake.submit(asking("stopped"))
    assert compiler.begun.wait(PATIENCE_S)
    intake.abort("stopped")
    intake.submit(asking("next"))
    compiler.allowed.set()
    assert passed.wait(1) == ["next"]


def test_what_is_no_grammar_passes_and_the_worker_says_so(intake, compiler, passed) -> None:
    compiler.allowed.set()
    intake.submit(asking("bad", "("))
    assert passed.wait(1) == ["bad"]


def test_nothing_passes_after_the_end(intake, compiler, passed) -> None:
    intake.submit(asking("late"))
    assert compiler.begun.wait(PATIENCE_S)
    intake.close()
    compiler.allowed.set()
    with pytest.raises(RuntimeError):
        intake.submit(asking("later", "b+"))
    assert not passed.requests
