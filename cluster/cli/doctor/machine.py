"""What `baton doctor` finds out about the machine: versions, GPUs, their links and clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.errors import ConfigError

_SMI_TIMEOUT_S = 15.0
_PACKAGES = ("torch", "nixl-cu13", "nixl-cu12", "ray", "triton", "flashinfer-python")
_FIELDS = (
    "index", "uuid", "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "clocks.max.mem", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
_LINK = re.compile(r"Link \d+:\s*([\d.]+)\s*GB/s")
_PCIE_LANE_BYTES_PER_S = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCI Express base specification: one lane in one direction, by generation, after encoding."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that the checked processes can be given.

    Attributes:
        position: among those that CUDA shows here; what `--gpus` takes.
        selector: its entry in CUDA_VISIBLE_DEVICES.
        facts: what nvidia-smi says of it, by field; empty where there is no nvidia-smi.
        nvlink_bytes_per_s: of its active NVLinks together, in one direction.
        nvlinks: how many are active.
    """

    position: int
    selector: str
    facts: Mapping[str, str]
    nvlink_bytes_per_s: float = 0.0
    nvlinks: int = 0

    @property
    def pcie_bytes_per_s(self) -> float:
        """What its slot can carry in one direction; 0 when unknown."""
        generation, width = (self.facts.get(f"pcie.link.{name}.max", "") for name in ("gen", "width"))
        if not (generation.isdecimal() and width.isdecimal()):
            return 0.0
        return _PCIE_LANE_BYTES_PER_S.get(int(generation), 0.0) * int(width)


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        versions: by name; what is not installed is missing.
        gpus: those that are checked.
        links: nvidia-smi's word for the way between two GPUs, by their nvidia-smi indices: NV18, PIX, SYS.
    """

    versions: Mapping[str, str]
    gpus: Sequence[Gpu]
    links: Mapping[tuple[str, str], str]

    def link(self, one: Gpu, other: Gpu) -> str | None:
        """The way between two GPUs in nvidia-smi's word; None when it does not say."""
        return self.links.get((one.facts.get("index", ""), other.facts.get("index", "")))


def examine(wanted: Sequence[int] | None, visible: str | None) -> Machine:
    """Look at this machine; takes a second or two, and makes no CUDA context.

    Args:
        wanted: positions of the GPUs to check; None: all of them.
        visible: CUDA_VISIBLE_DEVICES of this process.

    Raises:
        ConfigError: a GPU that is wanted is not there.
    """
    count = torch.cuda.device_count()
    positions = range(count) if wanted is None else wanted
    if missing := [position for position in positions if not 0 <= position < count]:
        raise ConfigError(f"--gpus names {missing[0]}, CUDA shows {count} GPUs here")
    selectors = [s.strip() for s in visible.split(",")] if visible else [str(i) for i in range(count)]
    described = _query_gpus() if count else []
    gpus = [_gpu(position, selectors[position], described) for position in positions]
    return Machine(_versions(described), gpus, topology(_smi("topo", "-m")) if len(gpus) > 1 else {})


def network_devices() -> set[str]:
    """Names that UCX_NET_DEVICES may hold here: interfaces, and RDMA devices without their port."""
    folders = (Path("/sys/class/net"), Path("/sys/class/infiniband"))
    return {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()}


def _gpu(position: int, selector: str, described: Sequence[Mapping[str, str]]) -> Gpu:
    facts = next((f for f in described if f["index"] == selector or f["uuid"].startswith(selector)), {})
    links = nvlink_rates(_smi("nvlink", "-s", "-i", facts["index"])) if facts else []
    return Gpu(position, selector, facts, sum(links), len(links))


def _query_gpus() -> list[dict[str, str]]:
    text = _smi(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    rows = ([cell.strip() for cell in line.split(",")] for line in text.splitlines())
    return [dict(zip(_FIELDS, row, strict=True)) for row in rows if len(row) == len(_FIELDS)]


def nvlink_rates(text: str) -> list[float]:
    """Bytes a second in one direction of each active link, from `nvidia-smi nvlink -s`."""
    return [float(rate) * 1e9 for rate in _LINK.findall(text)]


def topology(text: str) -> dict[tuple[str, str], str]:
    """The matrix of `nvidia-smi topo -m`, whose header may be underlined with escape codes."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    header = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line[:2]), [])
    columns = [name.removeprefix("GPU") for name in header if re.fullmatch(r"GPU\d+", name)]
    rows = [line for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line]
    return {
        (row[0].removeprefix("GPU"), column): cell
        for row in rows
        for column, cell in zip(columns, row[1:], strict=False)
        if cell != "X"
    }


def _versions(described: Sequence[Mapping[str, str]]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    if torch.version.cuda is not None:
        versions["CUDA (of torch)"] = torch.version.cuda
    if described:
        versions["NVIDIA driver"] = described[0]["driver_version"]
    return versions


def _smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing where there is none, or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
