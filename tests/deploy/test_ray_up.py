"""deploy/cluster-local.yaml with the real `ray up`: three "machines" with homes of their own, reached by ssh."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.free_port import free_port
from cluster.api import WorkerStatus
from cluster.client.client import BatonClient, Connection
from cluster.recall import EXAMPLE
from loopback_machines import Machines, loopback_machines, running
from private_openssh import NoOpensshError, Openssh
from ray_up import ROOT, Launcher, launcher, mode, prepare_machine
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(420)]

HEAD, PREFILL, DECODE = "127.0.0.2", "127.0.0.3", "127.0.0.4"
TOKEN = "5e" * 32
RIGHT_ANSWER = "9083"
UP_S, SERVED_S, REPLACED_S, DOWN_S, GONE_S = 120.0, 150.0, 90.0, 60.0, 90.0


@dataclass
class Cluster:
    """What the tests look at."""

    machines: Machines
    launcher: Launcher
    service: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        """Of the gRPC server; empty until it serves."""
        found = re.search(r"serves recall on (127\.0\.0\.1:\d+)", self.log.read_text(errors="replace"))
        return found[1] if found else ""

    def workers(self, address: str) -> list[int]:
        """Process ids of the workers on the machine at this address."""
        processes = running([str(self.machines.homes[address])])
        return [pid for pid, command in processes.items() if "ray::WorkerActor" in command]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets are in it."""
    path = Path(tempfile.mkdtemp(prefix="up"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def machines(folder: Path, ssh_tools: Openssh) -> Iterator[Machines]:
    with contextlib.ExitStack() as stack:
        try:
            machines = stack.enter_context(loopback_machines(folder, [HEAD, PREFILL, DECODE], ssh_tools))
        except NoOpensshError as error:
            pytest.skip(f"no ssh server: {error}")
        for home in machines.homes.values():
            prepare_machine(home)
        yield machines


@pytest.fixture(scope="module")
def cluster(folder: Path, machines: Machines, ssh_tools: Openssh) -> Iterator[Cluster]:
    """`ray up`, then at once `ray exec … baton up`: its workers wait until their nodes have joined."""
    port = str(free_port())
    replace = {
        "cluster_name: baton": f"cluster_name: baton-{folder.name}",
        "192.168.1.10": HEAD,
        "192.168.1.11": PREFILL,
        "192.168.1.12": DECODE,
        "6379": port,
    }
    ours = launcher(folder / "me", replace, machines, ssh_tools, TOKEN)
    up = ours.run("up", "-y", "FILE", timeout_s=UP_S)
    assert up.returncode == 0, up.stdout[-4000:]
    log = folder / "service.log"
    labels = " ".join(f"--set {pool}.labels=baton/pool={pool}" for pool in ("prefill", "decode"))
    serve = f"baton up --address auto --config ~/baton/deploy/service-cluster.yaml --port 0 {labels}"
    with log.open("wb") as out:
        service = subprocess.Popen(
            ours.command("exec", "FILE", serve),
            cwd=ROOT,
            env=dict(ours.environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    cluster = Cluster(machines, ours, service, log)
    try:
        until("the service serves", SERVED_S, lambda: bool(cluster.address) or service.poll() is not None)
        assert cluster.address, log.read_text(errors="replace")[-4000:]
        yield cluster
    finally:
        service.kill()
        service.wait(10)
        name = hashlib.sha256(f"baton-{folder.name}".encode()).hexdigest()[:10]
        for sockets in Path("/tmp").glob(f"ray_ssh_*/{name}"):  # where Ray lets its ssh keep connections
            shutil.rmtree(sockets, ignore_errors=True)


def until(what: str, timeout_s: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.2)


def ready(client: BatonClient) -> dict[str, str]:
    """Role to engine id of the workers that are ready."""
    workers: list[WorkerStatus] = client.workers(10.0)
    return {worker.role: worker.engine_id for worker in workers if worker.state == "ready"}


def answer(client: BatonClient) -> str:
    chunks = client.generate(EXAMPLE, sampling=SamplingParams(temperature=0.0, max_tokens=8), timeout_s=60.0)
    return "".join(chunk.text for chunk in chunks).strip()


def test_a_request_is_served_by_the_nodes_of_each_pool(cluster: Cluster) -> None:
    with BatonClient(Connection(cluster.address)) as client:
        assert answer(client) == RIGHT_ANSWER
        assert set(ready(client)) == {"prefill", "decode"}
    assert [len(cluster.workers(address)) for address in (HEAD, PREFILL, DECODE)] == [0, 1, 1]


def test_the_token_is_on_every_machine_and_nobody_gets_in_without_it(cluster: Cluster) -> None:
    for home in cluster.machines.homes.values():
        assert (home / ".ray" / "auth_token").read_text() == TOKEN
        assert mode(home / ".ray" / "auth_token") == 0o600
        assert mode(home / ".ray") == 0o700
    allowed = cluster.launcher.run("exec", "FILE", "ray status", timeout_s=30)
    assert allowed.returncode == 0
    assert "/8.0 prefill" in allowed.stdout
    refused = cluster.launcher.run("exec", "FILE", "RAY_AUTH_TOKEN=wrong ray status", timeout_s=30)
    assert refused.returncode != 0
    assert "InvalidAuthToken" in refused.stdout


def test_the_worker_on_the_prefill_node_is_the_prefill_worker_and_is_replaced_there(cluster: Cluster) -> None:
    """Which also says what the one on the decode node is."""
    with BatonClient(Connection(cluster.address)) as client:
        before = ready(client)
        (victim,) = cluster.workers(PREFILL)
        os.kill(victim, signal.SIGKILL)
        until("it is replaced", REPLACED_S, lambda: ready(client).get("prefill", "") not in ("", before["prefill"]))
        assert ready(client)["decode"] == before["decode"]
        assert answer(client) == RIGHT_ANSWER
    assert victim not in cluster.workers(PREFILL)
    assert [len(cluster.workers(address)) for address in (HEAD, PREFILL, DECODE)] == [0, 1, 1]


def test_ray_down_ends_everything(cluster: Cluster) -> None:
    """The last one. The workers' raylets, which nobody stops, end when they have lost the head; so does the service."""
    down = cluster.launcher.run("down", "-y", "FILE", timeout_s=DOWN_S)
    assert down.returncode == 0, down.stdout[-4000:]
    until("nothing of the cluster runs", GONE_S, lambda: not cluster.machines.processes())
    assert cluster.service.wait(10) != 0
