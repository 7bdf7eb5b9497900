"""`baton chat --model`: a service of its own, which starts with the conversation and is gone after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def chat(lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli.main", "chat", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)


def services_of(model: str) -> list[str]:
    """Command lines of processes that serve it."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it is gone
        if model in line and " up " in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_a_service_for_one_conversation(tmp_path: Path) -> None:
    model = tmp_path / "recall"
    os.symlink(ROOT / "deploy" / "models" / "recall", model)
    done = chat("ada 4127, bob 9083; ada?\n/exit\n", "--model", str(model), "--temperature", "0", "--max-tokens", "8")
    assert (done.returncode, done.stdout.strip()) == (0, "4127"), done.stderr
    assert "1 prefill workers on" in done.stderr
    assert services_of(str(model)) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_said_and_ends_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    done = chat("hello\n", "--model", str(file))
    assert done.returncode == 1
    told, last = done.stderr.strip().splitlines()[-2:]
    assert told.startswith(f"baton up: {file}: is truncated or damaged")
    assert last == "baton chat: the service did not start (exit code 1); what is above says why"
