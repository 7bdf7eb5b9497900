"""A process that is asked and that answers by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class LineProcess:
    """A Python file as a process of its own.

    Args:
        file: what it runs.
        pythonpath: where it finds what it imports.
        arguments: of its command line.
        silent: whether what it writes to its standard error is thrown away.
    """

    def __init__(self, file: Path, pythonpath: str, *arguments: str, silent: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(file), *arguments],
            env={**os.environ, "PYTHONPATH": pythonpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if silent else None,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result

    def ask(self, line: str = "") -> dict[str, Any]:
        """Its answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()
