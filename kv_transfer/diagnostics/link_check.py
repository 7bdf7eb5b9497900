"""Checks the path between two new processes on this machine, set up as workers set themselves up."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kv_transfer.diagnostics.endpoint import EndConfig, run_end
from kv_transfer.diagnostics.report import EndReport, Measured, PathReport
from kv_transfer.diagnostics.ucx_log import LOG_EVERYTHING, carriers, ucx_version
from kv_transfer.errors import PeerError

BLOCK_BYTES = 65_536
_SEED = 2026
_END_S = 2.0


class _Process:
    """A process that does one thing after the other, each until a deadline."""

    def __init__(self, config: EndConfig, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, far = context.Pipe()
        self._name = config.name
        self._deadline = deadline
        self._process = context.Process(target=run_end, args=(far, config), name=config.name, daemon=True)
        self._process.start()
        far.close()

    def post(self, method: str, *arguments: object) -> None:
        """Tell it to do something."""
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise PeerError(self._gone(method)) from error

    def result(self, method: str) -> Any:
        """What came of it.

        Raises:
            PeerError: it failed, took too long, or the process has ended.
        """
        try:
            if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
                raise PeerError(f"the {self._name} process was not done in time: {method}")
            ok, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise PeerError(self._gone(method)) from error
        if not ok:
            raise PeerError(f"the {self._name} process failed to {method}: {value}")
        return value

    def call(self, method: str, *arguments: object) -> Any:
        """Tell it to do something, and wait."""
        self.post(method, *arguments)
        return self.result(method)

    def end(self) -> None:
        """Ask it to end, and see to it."""
        self._pipe.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_S)

    def _gone(self, method: str) -> str:
        self._process.join(_END_S)
        return f"the {self._name} process ended with code {self._process.exitcode} ({method})"


def check_path(
    device: str, environments: tuple[Mapping[str, str], Mapping[str, str]], num_bytes: int, timeout_s: float
) -> PathReport:
    """Start a process that writes, as prefill does, and one that is written to, as decode is, and measure.

    Args:
        device: "cpu" or "cuda", of both.
        environments: variables of each, such as the card that it sees.
        num_bytes: of memory on each side, and of the largest transfer; at least 32 blocks of `BLOCK_BYTES`.
        timeout_s: for all of it.

    Raises:
        PeerError: a process failed, or it took too long. Both are gone then, too.
    """
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ucx.log"
        variables = ({**environments[0], **LOG_EVERYTHING, "UCX_LOG_FILE": str(log)}, environments[1])
        configs = [
            EndConfig(name, device, max(32, num_bytes // BLOCK_BYTES), environment)
            for name, environment in zip(("prefill", "decode"), variables, strict=True)
        ]
        with _running(configs, deadline) as (prefill, decode):
            ends, measured, data_arrived = _check(prefill, decode)
        text = log.read_text(errors="replace") if log.exists() else ""
    memory = "cuda" if device == "cuda" else "host"
    return PathReport(ends, carriers(text, memory), ucx_version(text), measured, data_arrived)


@contextlib.contextmanager
def _running(configs: list[EndConfig], deadline: float) -> Iterator[list[_Process]]:
    with contextlib.ExitStack() as stack:
        processes = []
        for config in configs:
            processes.append(_Process(config, deadline))
            stack.callback(processes[-1].end)
        yield processes


def _check(prefill: _Process, decode: _Process) -> tuple[tuple[EndReport, EndReport], Measured, bool]:
    for end in (prefill, decode):
        end.post("start")
    prefill_info, decode_info = prefill.result("start"), decode.result("start")
    ends = (prefill.call("describe"), decode.call("describe"))
    prefill.call("connect", decode_info)
    decode.call("connect", prefill_info)
    written = prefill.call("fill", _SEED)
    decode.post("serve")
    measured: Measured = prefill.call("measure", decode_info.engine_id)
    decode.post("checksum")
    decode.result("serve")
    return ends, measured, written == decode.result("checksum")
