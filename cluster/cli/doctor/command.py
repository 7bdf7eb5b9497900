"""`baton doctor`: proves the path that the KV cache takes between workers on this machine, and says what is wrong."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Iterator, Mapping

from cluster.cli.doctor.findings import CandidateReport, Link, environment_findings, pair_findings
from cluster.cli.doctor.machine import Gpu, Machine, examine, network_devices
from cluster.cli.doctor.report import Diagnosis, as_json, print_diagnosis
from cluster.config.load import CUDA_DEVICES_VARIABLE, transport_environment
from kv_transfer.diagnostics.link_check import check_path
from kv_transfer.errors import PeerError
from workers.errors import ConfigError

_EPILOG = """\
For each pair of GPUs (on a machine without: over host memory) two processes start, set up as workers are: each sees one
GPU, registers memory with NIXL, and one writes to the other. Exit status: 0 when all is well, 1 when something makes
handoffs slower than they should be, or fails.

examples:
  baton doctor
  baton doctor --gpus 0,1 --size 1024
  baton doctor --gpus none --json
"""
_SIZE_MIB = {"cuda": 512, "cpu": 128}
_MIN_SIZE_MIB = 4
_MIB = 1 << 20
_DEFAULTS = {"NIXL_LOG_LEVEL": "WARN", "UCX_NET_DEVICES": "lo"}
"""As `baton up` starts workers on one machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Measure the path between workers, say what carries the data, and what is wrong with it."
    parser.epilog = _EPILOG
    parser.add_argument("--gpus", metavar="LIST", help="such as 0,1, or none for host memory; default: all there are")
    parser.add_argument("--size", type=int, metavar="MIB", help="largest transfer; default: 512 on GPUs, else 128")
    parser.add_argument("--timeout", type=float, default=90.0, metavar="S", help="for each pair (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.size is not None and args.size < _MIN_SIZE_MIB:
        raise ConfigError(f"--size is {args.size}, it must be at least {_MIN_SIZE_MIB}")
    if args.timeout <= 0:
        raise ConfigError(f"--timeout is {args.timeout}, it must be more than 0")
    logging.basicConfig(level=logging.WARNING)
    own = transport_environment()
    machine = examine(_positions(args.gpus), own.get(CUDA_DEVICES_VARIABLE))
    variables = {**_DEFAULTS, **own}
    size = (args.size or _SIZE_MIB["cuda" if machine.gpus else "cpu"]) * _MIB
    pairs = list(_check_pairs(machine, variables, size, args.timeout))
    findings = environment_findings(variables, network_devices(), on_gpu=bool(machine.gpus))
    findings += [finding for pair in pairs for finding in pair_findings(pair)]
    diagnosis = Diagnosis(machine, variables, pairs, findings)
    if args.json:
        print(json.dumps(as_json(diagnosis), indent=2))
    else:
        print_diagnosis(diagnosis)
    return 1 if diagnosis.degraded else 0


def _positions(gpus: str | None) -> list[int] | None:
    """The GPUs to check; None: all."""
    if gpus is None:
        return None
    if gpus.strip().lower() == "none":
        return []
    try:
        return sorted({int(position) for position in gpus.split(",")})
    except ValueError as error:
        raise ConfigError(f"--gpus is {gpus!r}, it must be numbers with commas between them, or none") from error


def _check_pairs(
    machine: Machine, variables: Mapping[str, str], num_bytes: int, timeout_s: float
) -> Iterator[CandidateReport]:
    """Every pair of GPUs; one GPU with itself; host memory where no GPU is wanted."""
    if not machine.gpus:
        yield _check("host memory", "cpu", None, machine, variables, num_bytes, timeout_s)
        return
    gpus = machine.gpus
    for one, other in itertools.combinations(gpus, 2) if len(gpus) > 1 else [(gpus[0], gpus[0])]:
        name = f"GPU {one.position} → GPU {other.position}"
        yield _check(name, "cuda", (one, other), machine, variables, num_bytes, timeout_s)


def _check(
    name: str,
    device: str,
    gpus: tuple[Gpu, Gpu] | None,
    machine: Machine,
    variables: Mapping[str, str],
    num_bytes: int,
    timeout_s: float,
) -> CandidateReport:
    base = {**variables, "OMP_NUM_THREADS": "1"}
    one, other = (
        ({**base, CUDA_DEVICES_VARIABLE: gpu.selector, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for gpu in gpus)
        if gpus is not None
        else (base, base)
    )
    try:
        path = check_path(device, (one, other), num_bytes, timeout_s)
    except PeerError as error:
        return CandidateReport(name, Link("unknown", "unknown", 0.0), None, str(error))
    slowest_copy = min(end.copy_bytes_per_s for end in path.ends)
    return CandidateReport(name, _link(machine, gpus, slowest_copy), path)


def _link(machine: Machine, gpus: tuple[Gpu, Gpu] | None, copy_bytes_per_s: float) -> Link:
    """What joins two GPUs, and what it should carry."""
    if gpus is None:
        return Link("host memory", "a copy in memory", copy_bytes_per_s)
    one, other = gpus
    if one == other:
        return Link("same GPU", "a copy in the GPU's memory", copy_bytes_per_s)
    word = machine.link(one, other)
    if word is None:
        return Link("unknown", "unknown", 0.0)
    if word.startswith("NV"):
        return Link("NVLink", f"NVLink ({word})", min(one.nvlink_bytes_per_s, other.nvlink_bytes_per_s))
    return Link("PCIe", f"PCIe ({word})", min(one.pcie_bytes_per_s, other.pcie_bytes_per_s))
