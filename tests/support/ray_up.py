"""The real `ray up`, `ray exec` and `ray down` on `loopback_machines`, with the cluster file for real ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopback_machines import MARKER, Machines, running
from private_openssh import Openssh

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent

# What a machine of its own does not need: `ray stop` ends every Ray process of a machine by name, so here it looks only
# at this "machine's"; and raylets that share a machine cannot share ports or all of its memory.
_RAY = f"""\
#!/bin/bash
export RAY_worker_niceness=0
case "$1" in
  stop) exec "{sys.executable}" "{__file__}" "${MARKER}";;
  start) exec "{_BIN}/ray" "$@" --node-manager-port=0 --object-manager-port=0 --min-worker-port=0 --max-worker-port=0 \\
    --object-store-memory=80000000 --temp-dir="$HOME/ray" --disable-usage-stats;;
  *) exec "{_BIN}/ray" "$@";;
esac
"""


_RAY_PROCESSES = ("ray::", "/ray/", "-m ray.")


@dataclass(frozen=True)
class Launcher:
    """Whoever types `ray up`: a home of their own, with the token, and the cluster file."""

    file: Path
    environment: Mapping[str, str]

    def command(self, *arguments: str) -> list[str]:
        """`ray ARGUMENTS`, with FILE standing for the cluster file."""
        return [str(_BIN / "ray"), *(str(self.file) if a == "FILE" else a for a in arguments)]

    def run(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run `ray ARGUMENTS` from the top of the checkout."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )


def prepare_machine(home: Path) -> None:
    """Do what takes minutes on a real machine: have the environment that the cluster file's setup would make."""
    venv = home / "baton" / ".venv"
    (venv / "bin").mkdir(parents=True)
    ray = venv / "bin" / "ray"
    ray.write_text(_RAY)
    ray.chmod(0o755)
    (venv / "bin" / "baton").symlink_to(_BIN / "baton")
    pins = "deploy/constraints-gpu.txt" if shutil.which("nvidia-smi") else "constraints.txt"
    shutil.copy(ROOT / pins, venv / "installed")
    with (home / ".bashrc").open("a") as file:
        file.write("export RAY_TMPDIR=~\n")


def launcher(folder: Path, replace: Mapping[str, str], machines: Machines, tools: Openssh, token: str) -> Launcher:
    """Someone with a token, and deploy/cluster-local.yaml with other addresses.

    Args:
        folder: a new one, for the home.
        replace: text of the file to other text; each must be there.
        machines: to reach.
        tools: ssh and rsync.
        token: Ray's.
    """
    (folder / ".ray").mkdir(parents=True)
    secret = folder / ".ray" / "auth_token"
    secret.touch(0o600)
    secret.write_text(token)
    text = (ROOT / "deploy" / "cluster-local.yaml").read_text()
    for old, new in {**replace, "~/.ssh/id_ed25519": str(machines.key), "ubuntu": machines.user}.items():
        assert old in text, f"{old} is not in the cluster file"
        text = text.replace(old, new)
    file = folder / "cluster.yaml"
    file.write_text(text)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BATON_", "SSH_"))},
        **tools.environment,
        "PATH": os.pathsep.join([tools.give_ssh(folder), os.environ.get("PATH", os.defpath)]),
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return Launcher(file, environment)


def mode(path: Path) -> int:
    """Permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def stop_ray(home: str) -> None:
    """`ray stop` for the machine with this home: end its Ray processes, and nobody else's."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        victims = [
            pid
            for pid, command in running([home]).items()
            if any(disconnect in command for disconnect in _RAY_PROCESSES)
        ]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not victims:
            return
        time.sleep(0.05)


if __name__ == "__main__":
    stop_ray(sys.argv[1])
