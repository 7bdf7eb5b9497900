"""A server as a process of its own: started, waited for, and stopped with everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from workers.errors import ConfigError

_POLL_S = 0.05
_STOP_TIMEOUT_S = 10.0
T = TypeVar("T")


class ServerProcess:
    """A running server.

    Attributes:
        started: `time.perf_counter()` when it was started.
        log: its standard output and error.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, started: float) -> None:
        self._process = process
        self.log = log
        self.started = started

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Processor time of the process itself so far, without what it started; 0 once it is gone."""
        fields = _stat(self._process.pid)
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

    async def wait_for(self, ready: Callable[[], T | None], timeout_s: float) -> T:
        """Ask again and again until the answer is not None.

        Raises:
            ConfigError: the server has ended, or the time is over; the text has the end of its log.
        """
        deadline = self.started + timeout_s
        while True:
            if (answer := ready()) is not None:
                return answer
            code = self._process.poll()
            if code is not None:
                raise ConfigError(f"the server ended with {code}: {self.tail()}")
            if time.perf_counter() > deadline:
                raise ConfigError(f"the server was not ready after {timeout_s:g} s: {self.tail()}")
            await asyncio.sleep(_POLL_S)

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """The end of what it has written."""
        return self.text()[-2000:]

    def stop(self) -> None:
        """Interrupt it as Ctrl-C does, give it time, then kill what is left of it and of what it started."""
        family = descendants(self._process.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        for pid, began in {**family, **descendants(self._process.pid)}.items():
            if _start_time(pid) == began:  # no other process has got its number meanwhile
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)


@contextlib.contextmanager
def server_process(
    command: Sequence[str], environ: Mapping[str, str], log: Path, folder: Path | None = None
) -> Iterator[ServerProcess]:
    """Start a server; stop it when the block ends, which a SIGTERM to this process brings about too.

    To be called on the main thread.

    Args:
        command: program and arguments.
        environ: added to this process's environment.
        log: file for its output.
        folder: where it runs; None: here.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, **environ},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C on the terminal is the benchmark's affair
        )
        server = ServerProcess(process, log, started)
        with _SIGTERM:
            try:
                yield server
            finally:
                server.stop()


class _ExitOnSigterm:
    """Makes a SIGTERM end this process in the ordinary way as long as any server runs, whichever ends first."""

    def __init__(self) -> None:
        self._entered = 0
        self._before: Any = None

    def __enter__(self) -> None:
        if self._entered == 0:
            self._before = signal.signal(signal.SIGTERM, _exit)
        self._entered += 1

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            signal.signal(signal.SIGTERM, self._before)


_SIGTERM = _ExitOnSigterm()


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def descendants(pid: int) -> dict[int, str]:
    """Processes that a process has started, and theirs, each with its start time, by which it can be told apart."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if (began := _start_time(child)) is not None:
                found[child] = began
                waiting.append(child)
    return found


def _start_time(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[19] if fields else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
