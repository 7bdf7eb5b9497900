"""A process is gone when the kernel says so, and not when it is slow, stopped, or another of the same number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kv_transfer.process import ProcessId

_SAY_WHO = "import dataclasses, sys; from kv_transfer.process import ProcessId; "
_SAY_WHO += "print(*dataclasses.astuple(ProcessId.own()), flush=True); sys.stdin.read()"
OWN = ProcessId.own()


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], ProcessId]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SAY_WHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    host, namespace, pid, started = process.stdout.readline().split()
    yield process, ProcessId(host, namespace, int(pid), int(started))
    process.kill()
    process.wait(10)


def test_of_this_machine_it_is_known(child):
    process, name = child
    assert name.may_run(OWN) is True
    os.kill(process.pid, signal.SIGSTOP)
    assert name.may_run(OWN) is True, "it may go on"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{process.pid}").exists(), "nobody has asked for its exit status"
    assert name.may_run(OWN) is False
    process.wait(10)
    assert name.may_run(OWN) is False


def test_a_later_process_of_the_same_number_is_another_one():
    assert OWN.may_run(OWN) is True
    assert replace(OWN, started=OWN.started - 1).may_run(OWN) is False


def test_of_another_machine_or_namespace_it_is_not_known():
    assert replace(OWN, host="elsewhere").may_run(OWN) is None
    assert replace(OWN, pid_namespace="pid:[1]").may_run(OWN) is None
    assert replace(OWN, pid_namespace="").may_run(replace(OWN, pid_namespace="")) is None
