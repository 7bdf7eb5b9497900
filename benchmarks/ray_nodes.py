"""A Ray cluster of several nodes on this machine, each of which can be frozen whole.

Freezing stops every process of a node at once, raylet and workers: no connection is closed and nothing is said, which
is what a broken network or a machine without power looks like from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.free_port import free_port
from benchmarks.marked_processes import MARKER, running

_START_TIMEOUT_S = 60
_STORE_BYTES = 80_000_000


@dataclass
class RayNodes:
    """A head, and the nodes that were added.

    Attributes:
        address: to join.
        environment: of whoever joins: the token, and where this Ray keeps its files.
        folder: everything of the cluster is in it.
        nodes: name to the address of each.
    """

    address: str
    environment: dict[str, str]
    folder: Path
    nodes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, node_address: str, resources: Mapping[str, float]) -> None:
        """Have a node join. One after the other: two that start at once in one folder get in each other's way."""
        self._start(name, node_address, resources, [f"--address={self.address}"])

    def start_head(self, resources: Mapping[str, float]) -> None:
        """Start the head."""
        host, _, port = self.address.rpartition(":")
        self._start("head", host, resources, ["--head", f"--port={port}", "--include-dashboard=false"])

    def workers(self, name: str) -> list[int]:
        """Process ids of the workers on a node."""
        return [pid for pid, command in self._processes(name).items() if "ray::WorkerActor" in command]

    def processes(self, name: str) -> list[int]:
        """All of a node's processes."""
        return list(self._processes(name))

    def kill(self, name: str) -> None:
        """End every process of a node at once, the raylet first, which could start others."""
        while left := self._processes(name):
            for pid in sorted(left, key=lambda pid: "raylet" not in left[pid]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, name: str) -> list[int]:
        """Stop every process of a node, the raylet first, which could start others; returns them."""
        frozen: dict[int, None] = {}
        while left := [pid for pid in self._processes(name) if pid not in frozen]:
            for pid in sorted(left, key=lambda pid: "raylet" not in self._processes(name).get(pid, "")):
                frozen[pid] = None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
        return list(frozen)

    def thaw(self, pids: Sequence[int]) -> None:
        """Let frozen processes go on, the workers before the raylet that may end them."""
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill whatever is left of all nodes, and see that nothing is."""
        for _ in range(50):
            left = [pid for name in self.nodes for pid in self._processes(name)]
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        raise RuntimeError(f"processes of the cluster are left: {left}")

    def _processes(self, name: str) -> dict[int, str]:
        return running([str(self.folder / name)])

    def _start(self, name: str, node_address: str, resources: Mapping[str, float], arguments: Sequence[str]) -> None:
        self.nodes[name] = node_address
        command = [str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={node_address}", *arguments]
        command += [
            "--num-cpus=4",
            "--num-gpus=0",
            f"--resources={json.dumps(dict(resources))}",
            f"--object-store-memory={_STORE_BYTES}",
            "--disable-usage-stats",
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        own = {MARKER: str(self.folder / name), "UCX_NET_DEVICES": "lo"}
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            started = subprocess.run(
                command,
                env={**inherited, **self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=_START_TIMEOUT_S,
            )
        if started.returncode:
            raise RuntimeError(f"the node {name} does not start:\n{log.read_text()}")


@contextlib.contextmanager
def ray_nodes(head_address: str, resources: Mapping[str, float]) -> Iterator[RayNodes]:
    """Run a head for as long as the block lasts; then no process of the cluster is left.

    Args:
        head_address: a loopback address beyond 127.0.0.1, with which joining hangs.
        resources: of the head.
    """
    with tempfile.TemporaryDirectory(prefix="nodes", ignore_cleanup_errors=True) as folder:
        address = f"{head_address}:{free_port()}"
        joining = {
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_TMPDIR": folder,
        }
        nodes = RayNodes(address, joining, Path(folder))
        try:
            nodes.start_head(resources)
            yield nodes
        finally:
            nodes.end()
