"""A service of its own for a conversation: `baton up` in another process, which ends with this one."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

from workers.errors import ConfigError

_ADDRESS = re.compile(r"Baton serves .* on (\S+) \(")
_PR_SET_PDEATHSIG = 1
_STOP_S = 30.0


@contextlib.contextmanager
def local_service(arguments: Sequence[str]) -> Iterator[str]:
    """Start a service on a free port of this machine; yields its address, and stops it when the block ends.

    What it says while it starts goes to standard error. Ctrl-C does not reach it: it is in a process group of its own.

    Args:
        arguments: of `baton up`.

    Raises:
        ConfigError: it did not start; it has said why.
    """
    # A line for each request would stand in the middle of the conversation; who wants them sets it.
    quiet = ("--set", "logging.requests=false")
    command = [sys.executable, "-m", "cluster.cli.main", "up", *quiet, *arguments, "--set", "server.port=0"]
    service = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=_die_with_parent,
    )
    try:
        yield _address(service)
    finally:
        _stop(service)


def _address(service: subprocess.Popen[str]) -> str:
    assert service.stdout is not None
    for line in service.stdout:
        if match := _ADDRESS.match(line):
            return match[1]
    raise ConfigError(f"the service did not start (exit code {service.wait()}); what is above says why")


def _stop(service: subprocess.Popen[str]) -> None:
    """Ask it to stop; it has no request under way. After `_STOP_S`, or at Ctrl-C, it is killed."""
    assert service.stdout is not None
    service.stdout.close()
    service.send_signal(signal.SIGTERM)
    try:
        service.wait(_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        service.kill()
        service.wait()


def _die_with_parent() -> None:
    """In the new process, before the program: SIGTERM when the parent is gone, however it went (Linux, prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
