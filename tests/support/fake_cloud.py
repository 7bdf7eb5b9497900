"""A Ray cluster whose autoscaler "buys" nodes: Ray's fake multi-node provider starts them as processes here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.free_port import free_port
from loopback_machines import MARKER, running

_HEAD_ADDRESS = "127.0.0.6"
_HEAD_NODE_ID = "f" * 51 + "00000"
_START_TIMEOUT_S = 60
_STORE_BYTES = 80_000_000
IDLE_S = 3.0
"""After how long a node that nobody uses is given back."""


@contextlib.contextmanager
def fake_cloud(node_types: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Run the head, which has no resources, for as long as the block lasts; then no process of the cluster is left.

    Args:
        node_types: name to the resources of a node; there are none at first, and at most three of each.

    Yields:
        The address to join, and the environment in which to do so: the token, and where this Ray keeps its files.
    """
    with tempfile.TemporaryDirectory(prefix="fake", ignore_cleanup_errors=True) as folder:
        address = f"{_HEAD_ADDRESS}:{free_port()}"
        joining = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "RAY_TMPDIR": folder}
        file = Path(folder) / "cluster.json"
        file.write_text(json.dumps(_cluster_file(address, node_types)))
        try:
            _start(address, file, {**joining, MARKER: folder})
            yield address, joining
        finally:
            _end(folder)


def _cluster_file(address: str, node_types: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    common = {"node_config": {}, "min_workers": 0, "max_workers": 3}
    types = {
        name: {**common, "resources": {**resources, "object_store_memory": _STORE_BYTES}}
        for name, resources in node_types.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": 3 * len(types),
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 100,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "head_node_id": _HEAD_NODE_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            **types,
        },
        "head_node_type": "ray.head.default",
        **{key: [] for key in ("initialization_commands", "setup_commands", "head_setup_commands")},
        **{key: [] for key in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "auth": {},
    }


def _start(address: str, file: Path, environment: Mapping[str, str]) -> None:
    host, _, port = address.rpartition(":")
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "start", "--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0"]
    command += ["--num-gpus=0", f"--object-store-memory={_STORE_BYTES}", f"--autoscaling-config={file}"]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    log = file.with_suffix(".log")
    with log.open("w") as out:
        started = subprocess.run(
            command,
            env={**inherited, **environment, **fake},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=_START_TIMEOUT_S,
        )
    if started.returncode:
        raise RuntimeError(f"the head does not start:\n{log.read_text()}")


def _end(folder: str) -> None:
    """Kill what is left; the monitor first, which starts nodes."""
    for _ in range(20):
        left = running([folder])
        if not left:
            return
        for process in sorted(left, key=lambda pid: "monitor.py" not in left[pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
