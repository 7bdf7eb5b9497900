"""deploy/kubernetes/gateway.sh with stand-ins for Ray and Baton, as process 1 of a PID namespace where there is one.

In a container the script is process 1, and the kernel kills all others when it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "kubernetes" / "gateway.sh"
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
CAN_UNSHARE = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0

RAY = "#!/bin/bash\necho yes > {folder}/joined\nwhile [ ! -e {folder}/ray-ends ]; do sleep 0.05; done\n"
WGET = "#!/bin/bash\n[ -e {folder}/joined ] && echo success\n"
# Serves until TERM, then drains: which is done when Ray has been seen alive after half a second.
BATON = """#!/bin/bash
[ "$2" = --check ] && {{ grep -q right "$4"; exit; }}
echo "$@" > {folder}/asked
trap 'echo yes > {folder}/told; sleep 0.5; [ -e {folder}/ray-ends ] || echo yes > {folder}/drained; exit 0' TERM
echo yes > {folder}/serves
while true; do sleep 0.05; done
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The script where it serves, and its folder."""
    for name, text in (("ray", RAY), ("wget", WGET), ("baton", BATON)):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "service.yaml").write_text("right: 1\n")
    environment = {
        "KUBERAY_GEN_RAY_START_CMD": "ray start --block",
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "BATON_CONFIG_FILE": str(tmp_path / "service.yaml"),
        "BATON_CONFIG_LOOK_S": "0.1",
    }
    command = [*(UNSHARE if CAN_UNSHARE else []), "bash", str(SCRIPT)]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    until((tmp_path / "serves").exists)
    yield tmp_path, process
    (tmp_path / "ray-ends").touch()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def script_of(process: subprocess.Popen[bytes]) -> int:
    """Its process id out here: the child of unshare, which passes no signals on."""
    if not CAN_UNSHARE:
        return process.pid
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def test_a_gateway_that_is_told_to_stop_drains_while_ray_lives(gateway: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = gateway
    os.kill(script_of(process), signal.SIGTERM)
    assert process.wait(20) == 0
    assert (folder / "drained").exists()
    assert (folder / "asked").read_text() == f"up --config {folder}/service.yaml\n"


def test_a_gateway_whose_ray_ends_ends(gateway: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = gateway
    (folder / "ray-ends").touch()
    assert process.wait(20) == 0
    assert (folder / "told").exists()


def test_another_configuration_is_taken_when_it_is_right(gateway: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = gateway
    (folder / "service.yaml").write_text("wrong: 1\n")
    assert process.stderr is not None
    assert b"is not right" in process.stderr.readline()
    assert not (folder / "told").exists()
    (folder / "service.yaml").write_text("right: 2\n")
    assert process.wait(20) == 0
    assert (folder / "drained").exists()
