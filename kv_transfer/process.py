"""Which process an engine is, so that its peers on the same machine can see for themselves whether it is gone."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """Names a process for as long as its machine runs.

    Attributes:
        host: of the machine's kernel: the same for all processes under it, new at every boot.
        pid_namespace: in which `pid` is valid.
        pid: the process.
        started: ticks from boot to its start: tells it from a later one of the same number.
    """

    host: str
    pid_namespace: str
    pid: int
    started: int

    @classmethod
    def own(cls) -> ProcessId:
        """The calling process."""
        pid = os.getpid()
        try:
            host = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # no /proc: others cannot look, and take its end on trust
            return cls(platform.node(), "", pid, 0)
        return cls(host, namespace, pid, _stat(pid)[1])

    def may_run(self, viewer: ProcessId) -> bool | None:
        """Whether some of its threads may run yet, as the kernel says, which knows; None: `viewer` cannot look."""
        if self.host != viewer.host or self.pid_namespace != viewer.pid_namespace or not self.pid_namespace:
            return None
        try:
            state, started = _stat(self.pid)
            num_threads = sum(1 for _ in (_PROC / str(self.pid) / "task").iterdir())
        except OSError:
            return False
        return started == self.started and not (state in "ZX" and num_threads <= 1)

    def kill(self, viewer: ProcessId) -> None:
        """End it (SIGKILL, which ends a frozen one, too), where `viewer` can see it; never another of its number."""
        if not self.may_run(viewer):
            return
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(self.pid)
            try:
                if self.may_run(viewer):  # what is open now is what is looked at
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time of a process, fields 3 and 22 of /proc/PID/stat (man proc)."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    return fields[0], int(fields[19])
