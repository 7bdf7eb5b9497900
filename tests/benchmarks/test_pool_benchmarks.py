"""Benchmarks of splits: how rates are searched, how a standing load is sent and judged, what the tables make of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_pool_ratio, pool_tables
from benchmarks.client_processes import split_load
from benchmarks.environment import Environment
from benchmarks.goodput_search import Try, found, next_rate
from benchmarks.llama_8b import SHAPE, save_shape
from benchmarks.metrics import Objective
from benchmarks.running_pools import parse_asked
from benchmarks.standing_load import RUNNING, Sample, StandingLoad, send, summary
from cluster.client.messages import GenerateChunk
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

TINY = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OBJECTIVE = Objective(ttft=0.5, tpot=0.01)


@pytest.mark.parametrize("guess", [3.0, 9.5, 10.5, 24.0])
def test_the_search_closes_in_on_what_a_service_bears(guess: float) -> None:
    """One that bears 10 a second, and less of what is more."""
    tries: list[Try] = []
    while len(tries) < 8 and (rate := next_rate(tries, guess, 0.9)) is not None:
        tries.append(Try(rate, min(1.0, 0.9 * 10.0 / rate)))
    goodput = found(tries, 0.9)
    assert goodput.relation == "="
    assert goodput.rate == pytest.approx(10.0, rel=0.05)


def test_what_was_not_seen_is_not_said() -> None:
    assert (found([], 0.9).rate, found([Try(5.0, 0.2), Try(4.0, 0.5)], 0.9)) == (None, found([Try(4.0, 0.5)], 0.9))
    assert (found([Try(4.0, 0.5)], 0.9).relation, found([Try(4.0, 1.0)], 0.9).relation) == ("<", "≥")
    unlucky = [Try(4.0, 0.85), Try(8.0, 0.95), Try(10.0, 0.85)]
    assert found(unlucky, 0.9).rate == pytest.approx(9.0), "a lower rate that failed by chance does not count"


def test_parts_of_a_load_are_the_whole() -> None:
    load = StandingLoad(10.0, 8, 8, 7, 0.0, 0.1, 0.1, 1.0, "s", 100)
    parts = split_load(load, 3)
    assert sum(part.rate for part in parts) == pytest.approx(10.0)
    assert sorted(part.standing for part in parts) == [2, 2, 3]
    assert len({part.seed for part in parts}) == 3


@pytest.mark.parametrize(
    ("sample", "met"),
    [
        (Sample(10.0, status="OK", first=10.4, last=10.7, tokens=41), True),
        (Sample(10.0, status="OK", first=10.4, last=10.9, tokens=41), False),
        (Sample(10.0, status="OK", first=10.6, last=10.8, tokens=41), False),
        (Sample(10.0, status="RESOURCE_EXHAUSTED", seen_until=10.1), False),
        (Sample(10.0, status=RUNNING, first=10.4, last=10.7, tokens=41, seen_until=10.8), True),
        (Sample(10.0, status=RUNNING, seen_until=10.3), None),
        (Sample(10.0, status=RUNNING, seen_until=10.6), False),
    ],
)
def test_a_request_is_judged_by_what_was_seen_of_it(sample: Sample, met: bool | None) -> None:
    assert sample.meets(OBJECTIVE) is met


def test_what_cannot_be_judged_is_not_counted() -> None:
    samples = [Sample(0.0, status="OK", first=0.1, last=0.1, tokens=1), Sample(0.0, seen_until=0.2)]
    assert {key: summary(samples, OBJECTIVE)[key] for key in ("requests", "judged", "share")} == {
        "requests": 2, "judged": 1, "share": 1.0,
    }  # fmt: skip
    assert summary([], OBJECTIVE)["share"] == 0.0


class TwoTokens:
    """A client whose answers are a token at once, and then one that comes only if it was all that was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = 0

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[GenerateChunk]:
        """See `Client`."""
        assert sampling is not None
        wanted = sampling.max_tokens or 0
        self.asked.append(wanted)
        last = FinishReason.LENGTH if wanted == 1 else None
        try:
            yield GenerateChunk("", "", (1,), (), last, None, None)
            if wanted > 1:
                await asyncio.Event().wait()
        finally:
            self.closed += 1


@pytest.mark.parametrize(("output_tokens", "status"), [(1, "OK"), (50, RUNNING)])
def test_the_window_alone_is_returned_and_nothing_runs_on(output_tokens: int, status: str) -> None:
    client = TwoTokens()
    load = StandingLoad(400.0, 4, output_tokens, 20, time.perf_counter(), 0.0, 0.1, 0.1, "s", 100)
    samples = asyncio.run(send(client, load))
    assert 10 < len(samples) < len(client.asked) - 20 <= 160
    assert {sample.status for sample in samples} == {status}
    assert all(load.starts_at + 0.1 <= sample.due < load.ends_at for sample in samples)
    assert client.closed == len(client.asked)
    assert len(set(client.asked[:20])) > (5 if output_tokens > 1 else 0), "what stands is anywhere in its answer"


def test_a_workload_on_the_command_line() -> None:
    asked = parse_asked("x:100:20:500:8")
    assert (asked.prompt_tokens, asked.output_tokens, asked.objective.ttft, asked.objective.tpot) == (
        100, 20, 0.5, 0.008,
    )  # fmt: skip


def test_the_tables(tmp_path: Path) -> None:
    assert {make(tmp_path) for make in pool_tables.TABLES.values()} == {"No result is kept yet."}
    about = {
        "environment": Environment.capture(None, ["x"]).to_json(),
        "config": {"gpu_names": ["H"] * 4, "devices": "0,1,2,3", "note": ""},
    }
    asked = {"name": "w", "prompt_tokens": 10, "output_tokens": 5, "objective": {"ttft": 1.0, "tpot": 0.01}}
    tried = {"rate": 9.0, "share": 0.95, "ttft": {"p90": 0.2}, "tpot": {"p90": 0.005}, "gateway_cores": 0.5}

    def split(name: str, rate: float) -> dict[str, Any]:
        plans = [{"split": name, "goodput_per_s": 2 * rate, "bound_by": "decode"}]
        here = {"name": "w", "tried": [tried], "plans": plans, "recommended": "1P3D"}
        return {"split": name, "workloads": [{**here, "goodput": {"rate": rate, "relation": "="}}]}

    splits = [split("1P3D", 10.0), split("2P2D", 5.0), {"split": "3P1D", "error": "none"}]
    ratio = {**about, "workloads": [asked], "splits": splits}
    (tmp_path / "gpu_pool_ratio.json").write_text(json.dumps(ratio))
    text = pool_tables.pool_ratio(tmp_path)
    assert "| w: 10 in, 5 out; TTFT ≤ 1 s, TPOT ≤ 10 ms | 1P3D | 20.0 | **10.0** | 2.00 |" in text
    assert "| 2.00 | 200 | 5.00 | 0.50 | decode | yes | yes |" in text
    assert "for 1 of 1 workloads" in text
    assert "3P1D | —" in text
    low = {"summary": {"ttft": {"p50": 0.01, "p99": 0.02}}}
    sides = [
        {"disaggregation": "always", "low": low, "goodput": {"rate": 5.0, "relation": "="}, "tried": [tried]},
        {"disaggregation": "never", "low": low, "goodput": {"rate": 8.0, "relation": "="}},
    ]
    load = {"rate": 4.0, "prompt_tokens": 1, "output_tokens": 1, "duration_s": 1.0}
    (tmp_path / "gpu_losing_case.json").write_text(json.dumps({**about, "low": load, "asked": asked, "sides": sides}))
    text = pool_tables.losing_case(tmp_path)
    assert "| goodput/s | **5.0** | **8.0** | — | **0.62** |" in text
    assert "| TTFT p50, ms | 10.00 | 10.00 | — | **1.00** |" in text
    assert "| ITL p99, ms | — | — | — | — |" in text
    assert "| 1P1D | 9.0 | 95% | 200 | 5.00 | 0.50 |" in text
    (tmp_path / "gpu_losing_case.json").write_text(json.dumps({**about, "low": None, "asked": asked, "sides": sides}))
    assert "TTFT p50" not in pool_tables.losing_case(tmp_path)


@pytest.mark.slow
def test_a_split_is_started_planned_and_measured(tmp_path: Path) -> None:
    settings = ("handoff.connector=local", "prefill.num_blocks=64", "decode.num_blocks=64", "decode.device=cpu")
    output = tmp_path / "result.json"
    code = gpu_pool_ratio.main(
        [
            "--devices", "0,1", "--dtype", "float32", "--model", str(save_shape(tmp_path / "tiny", TINY)),
            "--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--seconds", "120",
            "--start-timeout", "90", "--window", "0.5", "--settle", "0.1", "--tries", "1", "--clients", "1",
            "--workloads", "tiny:20:6:2000:500", "--output", str(output), *(f"--set={text}" for text in settings),
        ]
    )  # fmt: skip
    assert code == 0
    (split,) = json.loads(output.read_text())["splits"]
    assert split["split"] == "1P1D"
    assert [worker["role"] for worker in split["workers"]] == ["prefill", "decode"]
    (here,) = split["workloads"]
    assert here["recommended"] == "1P1D"
    assert here["plans"][0]["goodput_per_s"] > 0
    assert here["tried"][0]["requests"] > 0
    assert here["goodput"]["rate"] == here["tried"][0]["rate"]
