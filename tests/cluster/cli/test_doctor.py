"""`baton doctor` really runs: two processes, real NIXL over host memory; and its judgement on facts made up for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.cli import main as cli
from cluster.cli.doctor.findings import (
    CUDA_IPC,
    SHARED_MEMORY,
    TCP,
    CandidateReport,
    Link,
    environment_findings,
    pair_findings,
)
from cluster.cli.doctor.machine import nvlink_rates, topology
from cluster.config.load import transport_environment
from kv_transfer.diagnostics.report import EndReport, Measured, PathReport, Rate
from kv_transfer.link_cost import LinkCost

ROOT = Path(__file__).parents[3]
NVLINK = Link("NVLink", "NVLink (NV18)", 478e9)


def doctor(*flags: str, **variables: str) -> tuple[int, dict]:
    """The command in a process of its own; its exit status and its JSON."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", "doctor", "--json", "--size", "8", *flags],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    answer, _ = process.communicate(timeout=200)
    assert ends(process.pid), "the doctor left somebody behind"
    return process.returncode, json.loads(answer)


def ends(group: int, patience_s: float = 20.0) -> bool:
    """Whether nobody is left in a process group, or soon will be."""
    give_up_at = time.monotonic() + patience_s
    while time.monotonic() < give_up_at:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.nixl
def test_host_memory_is_measured():
    code, answer = doctor("--gpus", "none")
    (pair,) = answer["pairs"]
    measured = pair["path"]["measured"]
    assert pair["path"]["data_arrived"]
    assert pair["transport"] in (SHARED_MEMORY, TCP)
    assert "WRITE " + pair["path"]["carriers"]["WRITE"] in pair["evidence"]
    assert (code == 0) == answer["ok"] == (not any(f["degraded"] for f in answer["findings"]))
    assert code == 0 or pair["transport"] == TCP or "reaches" in answer["findings"][0]["what"]
    rates = {(rate["operation"], rate["num_bytes"]) for rate in measured["rates"]}
    assert rates == {(operation, size) for operation in ("WRITE", "READ") for size in (1 << 16, 1 << 20, 1 << 23)}
    assert all(rate["bytes_per_s"] > 0 for rate in measured["rates"])
    scattered, together = measured["postings"][1:]
    assert (scattered["num_blocks"], scattered["num_descriptors"]) == (32, 32)
    assert (together["num_blocks"], together["num_descriptors"]) == (32, 1)
    assert measured["round_trip_s"] > 0
    assert answer["versions"]["torch"] == torch.__version__
    assert answer["versions"]["ucx"]


@pytest.mark.slow
@pytest.mark.nixl
def test_tcp_is_told_loudly():
    code, answer = doctor("--gpus", "none", UCX_TLS="tcp")
    (pair,) = answer["pairs"]
    assert code == 1
    assert pair["transport"] == TCP
    assert any("goes over TCP" in finding["what"] and finding["mend"] for finding in answer["findings"])


@pytest.mark.nixl
def test_a_transport_that_cannot_start_ends_in_a_finding():
    code, answer = doctor("--gpus", "none", UCX_TLS="cma")
    assert code == 1
    assert answer["pairs"][0]["path"] is None
    what = [finding["what"] for finding in answer["findings"]]
    assert any("excludes tcp" in text for text in what)
    assert any("host memory: the prefill process failed to start" in text for text in what)


@pytest.mark.nixl
def test_an_impatient_doctor_ends_and_leaves_nobody_behind():
    code, answer = doctor("--gpus", "none", "--timeout", "0.2")
    assert code == 1
    assert "not done in time" in answer["pairs"][0]["failure"]


@pytest.mark.gpu
@pytest.mark.nixl
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_processes_on_one_gpu():
    _, answer = doctor("--gpus", "0")
    (pair,) = answer["pairs"]
    assert pair["path"]["data_arrived"]
    assert pair["transport"] == CUDA_IPC
    assert [end["cuda_context"] for end in pair["path"]["ends"]] == [True, True]
    assert all("cuda" in end["ucx_modules"] for end in pair["path"]["ends"])
    # How fast it goes depends on what else the GPU does meanwhile; any other finding is a fault.
    assert all("should give" in finding["what"] for finding in answer["findings"]), answer["findings"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "a"], "must be numbers"),
        (["--gpus", "97"], "CUDA shows"),
        (["--size", "1"], "at least 4"),
        (["--timeout", "0"], "more than 0"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert cli.main(["doctor", *flags]) == 1
    assert message in capsys.readouterr().err


def end(**changes: object) -> EndReport:
    return dataclasses.replace(EndReport("cuda", "H200", "GPU-0", True, ("cma", "cuda"), 2e12), **changes)


def pair(
    carrier: str | None = "cuda_ipc/cuda", link: Link = NVLINK, gbps: float = 360.0, **changes: object
) -> CandidateReport:
    rates = tuple(Rate(operation, 1 << 28, gbps * 1e9) for operation in ("WRITE", "READ"))
    measured = Measured(0.05, 1e-4, LinkCost(20e-6, 1e-6, gbps * 1e9), rates, (), 20e-6)
    carriers = {} if carrier is None else {"WRITE": carrier, "READ": carrier}
    path = PathReport((end(), end(device_uuid="GPU-1")), carriers, "1.23.0", measured, True)
    return CandidateReport("GPU 0 → GPU 1", link, dataclasses.replace(path, **changes))


def test_a_good_path_has_no_findings():
    assert pair_findings(pair()) == []
    assert pair().transport == CUDA_IPC


@pytest.mark.parametrize(
    ("report", "what"),
    [
        (pair("software emulation on tcp/eth0"), "goes over TCP"),
        (pair("cma/memory"), "through host memory"),
        (pair(gbps=40.0), "WRITE reaches 40.0 GB/s"),
        (pair(None, gbps=30.0), "nothing says what carries"),
        (pair(data_arrived=False), "not what arrived"),
        (pair(ends=(end(), end())), "both processes were given GPU-0"),
        (pair(ends=(end(), end(cuda_context=False))), "no CUDA context"),
        (pair(ends=(end(ucx_modules=("cma",)), end())), "has not loaded its CUDA module"),
        (CandidateReport("GPU 0 → GPU 1", NVLINK, None, "the decode process ended with code -9"), "code -9"),
    ],
)
def test_what_is_wrong_is_told_with_its_mend(report, what):
    findings = [finding for finding in pair_findings(report) if what in finding.what]
    assert findings
    assert all(finding.degraded and finding.mend for finding in findings)


def test_pcie_is_a_note():
    slot = Link("PCIe", "PCIe (SYS)", 63e9)
    (finding,) = pair_findings(pair(link=slot, gbps=50.0))
    assert "no NVLink" in finding.what
    assert not finding.degraded
    assert any(f.degraded for f in pair_findings(pair(link=slot, gbps=10.0)))
    assert pair_findings(pair(link=slot, gbps=300.0)) == [], "faster than any slot: the topology is not told here"


def test_a_speed_that_only_cuda_ipc_reaches_says_so():
    report = pair(None, gbps=300.0)
    assert report.transport == CUDA_IPC
    assert "judged by the speed" in report.evidence


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({}, None),
        ({"UCX_TLS": "all"}, None),
        ({"UCX_TLS": "tcp,cuda"}, None),
        ({"UCX_TLS": "^ib"}, None),
        ({"UCX_NET_DEVICES": "lo"}, None),
        ({"UCX_NET_DEVICES": "mlx5_0:1,lo"}, None),
        ({"UCX_TLS": "tcp,cma"}, "excludes cuda_ipc"),
        ({"UCX_TLS": "^cuda_ipc"}, "excludes cuda_ipc"),
        ({"UCX_TLS": "cuda_ipc,cuda_copy"}, "excludes tcp"),
        ({"UCX_NET_DEVICES": "eth7"}, "names eth7"),
    ],
)
def test_the_environment(variables, what):
    found = environment_findings(variables, {"lo", "mlx5_0"}, on_gpu=True)
    assert [what in finding.what for finding in found] == ([True] if what else [])


def test_only_variables_of_the_transport_are_taken():
    environ = {"UCX_TLS": "all", "NIXL_LOG_LEVEL": "WARN", "CUDA_VISIBLE_DEVICES": "1", "PATH": "/bin"}
    assert transport_environment(environ) == {k: v for k, v in environ.items() if k != "PATH"}


def test_nvidia_smi_is_understood():
    text = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n\t Link 2: <inactive>\n"
    assert nvlink_rates(text) == [26.562e9, 26.562e9]
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tPIX\t0-15\t0\nGPU1\tNV18\t X \tSYS\t0-15\t0\nNIC0\tPIX\tSYS\t X \n\nLegend:\n  X    = Self\n"
    )
    assert topology(matrix) == {("0", "1"): "NV18", ("1", "0"): "NV18"}
