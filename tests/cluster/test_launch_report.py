"""What a start says while it goes on, and of each worker once it is ready."""

from __future__ import annotations

from dataclasses import replace

from cluster.launch_report import progress_lines, worker_line
from cluster.worker_handle import StartProgress
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.region import Region
from kv_transfer.transports.base import EngineInfo
from workers.builder import WorkerMemory
from workers.runner.step_times import StepTimes
from workers.worker_host import WorkerInfo

ENGINE = EngineInfo(
    "decode-0.1",
    1,
    KVLayout((GroupLayout("full", tuple(range(32)), 64, 8, 128, "bfloat16"),)),
    (Region(0, 32, 1000, 1 << 18),),
    "cuda",
    0,
    b"",
)
WORKER = WorkerInfo(
    "decode-0",
    "decode",
    (ENGINE,),
    "NVIDIA H200",
    "FLASHINFER",
    8192,
    64,
    1000,
    StepTimes(),
    1,
    WorkerMemory(16_060_000_000, 8_388_608_000, 36, 520_000_000),
)


def test_a_worker_on_a_gpu_states_what_it_takes_there():
    assert worker_line(WORKER) == (
        "decode-0 on NVIDIA H200: FLASHINFER, weights 16.06 GB, "
        "1000 KV blocks of 64 tokens (64000 tokens, 8.39 GB), 36 CUDA graphs 520.0 MB"
    )


def test_ranks_each_take_as_much():
    ranks = replace(WORKER, engines=(ENGINE, ENGINE), device="2 × NVIDIA H200", memory=WorkerMemory(8_030_000_000, 1))
    assert worker_line(ranks) == (
        "decode-0 on 2 × NVIDIA H200: FLASHINFER, weights 8.03 GB, "
        "1000 KV blocks of 64 tokens (64000 tokens, 0.0 MB), on each"
    )


def test_weights_are_told_by_tenths_and_graphs_by_thirds():
    lines: list[str] = []
    show = progress_lines(lines.append)
    for done in range(0, 1001, 10):
        show("prefill-0", StartProgress("weights", done * 1_000_000, 1_000_000_000))
    for done in range(1, 37):
        show("decode-0", StartProgress("graphs", done, 36))
    assert lines[:10] == [f"prefill-0: {tenth * 100:.1f} of 1000.0 MB of weights" for tenth in range(1, 11)]
    assert lines[10:] == [f"decode-0: captured {done} of 36 CUDA graphs" for done in (12, 24, 36)]


def test_workers_and_stages_are_told_apart_and_nothing_twice():
    lines: list[str] = []
    show = progress_lines(lines.append)
    for name in ("decode-0", "decode-1", "decode-0"):
        show(name, StartProgress("weights", 5, 5))
        show(name, StartProgress("graphs", 3, 3))
    assert len(lines) == len(set(lines)) == 4
