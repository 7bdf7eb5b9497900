"""The other end of `served_process`: starts it, asks it, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.server_process import ServerProcess, server_process

_START_S = 180.0
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Served:
    """A service that runs.

    Attributes:
        process: its gateway.
        folder: for its socket and log.
    """

    process: ServerProcess
    folder: Path

    async def wait(self) -> Mapping[str, str]:
        """Until it serves: where, by door."""
        return await self.process.wait_for(self._addresses, _START_S)

    def _addresses(self) -> Mapping[str, str] | None:
        with contextlib.suppress(FileNotFoundError):
            addresses: Mapping[str, str] = json.loads((self.folder / "address").read_text())
            return addresses
        return None

    async def ask(self, question: str) -> Any:
        """What it says to a question of `Inside.answer`.

        Raises:
            OSError: it is not there, or is silent.
            RuntimeError: it cannot say.
        """
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self.folder / "asked", limit=1 << 26)
                writer.write(question.encode() + b"\n")
                line = await reader.readline()
                writer.close()
        except TimeoutError as error:
            raise OSError(f"the service is silent on {question}") from error
        if not line:
            raise OSError(f"the service went away over {question}")
        said = json.loads(line)
        if isinstance(said, dict) and "error" in said:
            raise RuntimeError(f"{question}: {said['error']}")
        return said


@contextlib.contextmanager
def served(folder: Path, settings: Mapping[str, object], environ: Mapping[str, str]) -> Iterator[Served]:
    """Run a service until the block ends.

    Args:
        folder: its own; emptied.
        settings: of its configuration.
        environ: added to this process's environment.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.faults.served_process", str(folder), *words]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with server_process(command, {"PYTHONPATH": path, **environ}, folder / "log", ROOT) as process:
        yield Served(process, folder)
