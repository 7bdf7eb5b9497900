"""`baton up` in a process of its own, for tests of what becomes of it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def start_up(checkpoint: Path, *settings: str) -> subprocess.Popen:
    """Start it with small caches, on a free port; `settings` are such as "server.drain_timeout_s=120"."""
    asked = (*settings, "prefill.num_blocks=256", "decode.num_blocks=512", "server.port=0")
    command = [sys.executable, "-m", "cluster.cli.main", "up", "--model", str(checkpoint)]
    command += [word for setting in asked for word in ("--set", setting)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=_ROOT, stdout=pipe, stderr=pipe, text=True)


async def address_of(process: subprocess.Popen) -> str:
    """Where it serves, once it says so."""
    return re.search(r"on (127\.0\.0\.1:\d+)", await asyncio.to_thread(_welcome_of, process))[1]


def _welcome_of(process: subprocess.Popen) -> str:
    text = ""
    for line in process.stdout:
        text += line
        if "Ctrl-C" in line:
            return text
    raise AssertionError(process.stderr.read())
