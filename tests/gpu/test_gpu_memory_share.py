"""Workers that share a GPU stay within their shares of it, whatever they are sent. Nothing else may use the card.

Run this file alone: it looks at the memory of the whole card.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from pair_gateway import PairGateway
from shapes import billion_config
from worker_process import WorkerProcess
from workers.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.nixl,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GB = 10**9
SEQS, BUDGET, WINDOW = 256, 8192, 16384


def used() -> int:
    """Bytes in use on the card, by everybody."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(billion_config("llama")))
    return tmp_path


@pytest.fixture
def start(folder):
    """`start(role, utilization)`: a worker of a model of a billion random weights, not yet ready."""
    started: list[WorkerProcess] = []

    def make(role: str, utilization: float) -> WorkerProcess:
        started.append(
            WorkerProcess(
                name=f"{role}-0",
                role=role,
                model=str(folder),
                load_format="dummy",
                dtype="bfloat16",
                device="cuda",
                block_size=64,
                max_num_seqs=SEQS,
                max_num_batched_tokens=BUDGET,
                max_model_len=WINDOW,
                gpu_memory_utilization=utilization,
            )
        )
        return started[-1]

    yield make
    for worker in started:
        worker.kill()


def hardest_load(gateway: PairGateway, rng: random.Random) -> int:
    """The longest prompts and the most, then the most sequences, sampled in every way; bytes in use at the peak."""
    lengths = [WINDOW - 200] * 2 + [BUDGET] * 4 + [1] * SEQS + [700] * SEQS
    peak = 0
    for number, length in enumerate(lengths):
        prompt = [rng.randrange(3, 128_000) for _ in range(length)]
        sampling = SamplingParams(
            temperature=0.8, top_p=0.9, top_k=1000, min_p=0.001, repetition_penalty=1.1, logprobs=5,
            seed=number, max_tokens=24, ignore_eos=True,
        )  # fmt: skip
        gateway.submit(f"r{number}", prompt, sampling)
    while gateway.num_open:
        gateway.run_until_open(max(0, gateway.num_open - 20), 120.0)
        peak = max(peak, used())
    gateway.wait_idle(30.0)
    failures = [asked.failure for asked in gateway.asked.values() if asked.failure]
    assert not failures, failures[:3]
    return peak


@pytest.mark.parametrize(("utilization", "together"), [(0.45, True), (0.5, False)])
def test_two_workers_share_one_gpu(utilization, together, start, record_property):
    """Started at once, as a service does, or one after the other with half of the card each."""
    total, before = torch.cuda.mem_get_info()[1], used()
    if before > 0.05 * total:
        pytest.skip(f"other processes use {before / GB:.1f} GB of the card")
    share = int(total * utilization)
    workers = {}
    after_start = {}
    for role in ("prefill", "decode"):
        workers[role] = start(role, utilization)
        if not together:
            workers[role].wait_ready()
            after_start[role] = used()
    if together:
        for worker in workers.values():
            worker.wait_ready()
    started = used() - before
    gateway = PairGateway(workers["prefill"], workers["decode"], random.Random(2))
    peak = hardest_load(gateway, random.Random(3)) - before
    held = {role: worker.call("gpu_memory") for role, worker in workers.items()}
    if not together:
        after_start["decode"] -= after_start["prefill"]
        after_start["prefill"] -= before
    gb = {
        "share": share, "both after start": started, "both at the peak": peak,
        **{f"{role} after start": value for role, value in after_start.items()},
        **{f"{role} {kind}": value for role, kinds in held.items() for kind, value in kinds.items()},
    }  # fmt: skip
    for role, worker in workers.items():
        gb |= {f"{role} {kind}": value for kind, value in vars(worker.info.memory).items() if kind.endswith("bytes")}
    summary = ", ".join(f"{name} {value / GB:.2f} GB" for name, value in gb.items())
    record_property("memory", summary)
    print(summary)
    assert started > 1.8 * share, "the caches do not fill the shares"
    assert peak <= 2 * share
    for role, value in after_start.items():
        assert value <= share, role
