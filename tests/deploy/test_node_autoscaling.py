"""Real Ray and an autoscaler that starts nodes: a pool that finds no room gets nodes of its kind and of no other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.client.client import BatonClient, Connection
from cluster.recall import EXAMPLE
from fake_cloud import IDLE_S, fake_cloud
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(280)]

BIN = Path(sys.executable).parent
NODE_TYPES = {"prefill": {"CPU": 1, "prefill": 1}, "decode": {"CPU": 1, "decode": 1}}
SERVED_S, IDLE_TIMEOUT_S, STATUS_S = 90.0, IDLE_S + 60.0, 20.0


@pytest.fixture(scope="module")
def cloud() -> Iterator[tuple[str, dict[str, str]]]:
    with fake_cloud(NODE_TYPES) as (address, joining):
        yield address, {**os.environ, **joining}


def nodes(address: str, environment: Mapping[str, str]) -> dict[str, int]:
    """How many nodes of each type Ray's autoscaler counts as active."""
    command = [str(BIN / "ray"), "status", "--address", address]
    status = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=60, check=True
    ).stdout
    active = status.partition("Active:\n")[2].partition("Pending:")[0]
    return {name: int(number) for number, name in re.findall(r"^ +(\d+) (prefill|decode)$", active, flags=re.MULTILINE)}


@contextmanager
def service(address: str, environment: Mapping[str, str], decode: int, log: Path) -> Iterator[str]:
    """`baton up` on the cluster; yields the server's address."""
    command = [str(BIN / "baton"), "up", "--address", address, "--port", "0", "--decode", str(decode)]
    for setting in ("prefill.resources=prefill=1", "decode.resources=decode=1"):
        command += ["--set", setting]
    for pool in ("prefill", "decode"):
        command += ["--set", f"{pool}.threads=1", "--set", f"{pool}.num_blocks=256"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until("the service serves", SERVED_S, lambda: "Ctrl-C" in log.read_text() or process.poll() is not None)
        served = re.search(r"serves recall on (127\.0\.0\.1:\d+)", log.read_text())
        assert served, log.read_text()
        yield served[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait(10)


def until(what: str, timeout_s: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.5)


def test_a_pool_that_grows_gets_a_node_of_its_type_and_idle_nodes_are_given_back(
    cloud: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    assert nodes(*cloud) == {}
    with service(*cloud, decode=1, log=tmp_path / "first.log"):
        until("there is a node for each worker", STATUS_S, lambda: nodes(*cloud) == {"prefill": 1, "decode": 1})
    with service(*cloud, decode=2, log=tmp_path / "second.log") as address:
        until("a decode node was added", STATUS_S, lambda: nodes(*cloud) == {"prefill": 1, "decode": 2})
        log = (tmp_path / "second.log").read_text()
        assert "the decode pool waits for nodes: it needs 2 decode, the Ray cluster has " in log
        with BatonClient(Connection(address)) as client:
            sampling = SamplingParams(temperature=0.0, max_tokens=8)
            text = "".join(chunk.text for chunk in client.generate(EXAMPLE, sampling=sampling, timeout_s=60.0))
            assert text.strip() == "9083"
        assert nodes(*cloud) == {"prefill": 1, "decode": 2}
    until("the nodes are given back", IDLE_TIMEOUT_S, lambda: nodes(*cloud) == {})
