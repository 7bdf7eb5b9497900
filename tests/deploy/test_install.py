"""Which versions a node gets."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_THE_GPU = {
    *("torch", "triton", "flashinfer-python"),
    *("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi"),
}


def pins(file: Path) -> dict[str, str]:
    lines = (line.strip() for line in file.read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder like ~/baton, with a Python that writes down what it is asked for instead of doing it."""
    home = tmp_path / "baton"
    (home / "deploy").mkdir(parents=True)
    for name in ("constraints.txt", "deploy/constraints-gpu.txt", "deploy/install.sh"):
        shutil.copy(ROOT / name, home / name)
    bins = tmp_path / "bin"
    bins.mkdir()
    (tmp_path / "pip").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n')
    (tmp_path / "pip").chmod(0o755)
    made = f'mkdir -p "$3/bin" && cp {tmp_path}/pip "$3/bin/pip"'  # by: python3.12 -m venv FOLDER
    (bins / "python3.12").write_text(f'#!/bin/bash\n[ "$1" = -c ] || {{ {made}; }}\n')
    (bins / "python3.12").chmod(0o755)
    return home


def install(node: Path, *arguments: str) -> list[str]:
    """Run the script; returns what pip was asked for, so far."""
    path = f"{node.parent / 'bin'}:/usr/bin:/bin"
    subprocess.run([str(node / "deploy" / "install.sh"), *arguments], env={"PATH": path}, check=True, timeout=30)
    asked = node.parent / "asked"
    return asked.read_text().splitlines() if asked.exists() else []


def test_the_lists_differ_in_what_belongs_to_the_gpu_alone() -> None:
    cpu, gpu = pins(ROOT / "constraints.txt"), pins(ROOT / "deploy" / "constraints-gpu.txt")
    assert {name for name in cpu.keys() | gpu.keys() if cpu.get(name) != gpu.get(name)} == OF_THE_GPU


def test_a_node_without_a_gpu(node: Path) -> None:
    (call,) = install(node, "cpu", "ray[default]")
    assert "-c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu -e . ray[default]" in call


def test_a_gpu_is_noticed_and_nothing_is_done_twice_until_the_versions_change(node: Path) -> None:
    smi = node.parent / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    (call,) = install(node)
    assert call.endswith("-c deploy/constraints-gpu.txt -e .[gpu]")
    assert len(install(node)) == 1
    (node / "deploy" / "constraints-gpu.txt").write_text("torch==2.12.0\n")
    assert len(install(node)) == 2
    assert len(install(node)) == 2
