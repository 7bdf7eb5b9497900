"""The side of the peer: its client and proxy against a strict stand-in, its engine's driver, its imports."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.llama_8b import SHAPE, save_shape
from benchmarks.measure import Client, Row, WallClock, measure_request
from benchmarks.peers import vllm_engine, vllm_handoff
from benchmarks.peers.openai_client import DisaggregatedClient, Endpoint, OpenAIClient
from benchmarks.workload import RequestSpec
from workers.sampling_params import SamplingParams

TINY = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAKE = Path(__file__).with_name("fake_openai_server.py")


def _load_fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_openai_server", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _load_fake()


@asynccontextmanager
async def _running(server: Any) -> Any:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listener:
        yield Endpoint("127.0.0.1", listener.sockets[0].getsockname()[1], "model")


async def _ask(client: Client, max_tokens: int = 5, timeout_s: float = 5.0) -> Row:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    spec = RequestSpec(3, (5, 6, 7), None, None, sampling)
    clock = WallClock()
    return await measure_request(client, spec, clock, clock.now(), 0.0, timeout_s)


async def test_every_token_of_a_stream_is_counted_when_it_comes() -> None:
    server = fake.FakeServer()
    async with _running(server) as endpoint:
        row = await _ask(OpenAIClient(endpoint))
    assert (row.status, row.output_tokens, row.prompt_tokens, row.finish_reason) == ("OK", 5, 3, "length")
    assert len(row.itl_s) == 4
    assert row.first_token_s is not None
    sent = server.requests[0]
    assert sent["prompt"] == [5, 6, 7]
    assert sent["ignore_eos"]
    assert sent["temperature"] == 0.0


async def test_the_pair_computes_the_prompt_on_one_server_and_the_answer_on_the_other() -> None:
    prefill, decode = fake.FakeServer("kv_producer"), fake.FakeServer("kv_consumer")
    async with _running(prefill) as first, _running(decode) as second:
        row = await _ask(DisaggregatedClient(first, second))
    assert (row.status, row.output_tokens) == ("OK", 5)
    (asked,), (handed,) = prefill.requests, decode.requests
    assert asked["max_tokens"] == 1
    assert not asked["stream"]
    assert "stream_options" not in asked
    assert asked["kv_transfer_params"]["do_remote_decode"]
    assert handed["max_tokens"] == 5
    assert handed["kv_transfer_params"] == {"do_remote_prefill": True, "remote_request_id": fake.cache_id([5, 6, 7])}


async def test_a_server_that_keeps_no_cache_is_no_prefill_server() -> None:
    prefill, decode = fake.FakeServer(), fake.FakeServer("kv_consumer")
    async with _running(prefill) as first, _running(decode) as second:
        row = await _ask(DisaggregatedClient(first, second))
    assert row.status == "PeerError"
    assert "kv_transfer_params" in row.error
    assert decode.requests == []


async def test_failures_become_the_status_of_their_request() -> None:
    async with _running(fake.FakeServer("kv_consumer")) as endpoint:
        refused = await _ask(OpenAIClient(endpoint))
    assert refused.status == "PeerError"
    assert "400" in refused.error
    async with _running(fake.FakeServer(break_after=2)) as endpoint:
        broken = await _ask(OpenAIClient(endpoint))
    assert (broken.status, broken.output_tokens) == ("PeerError", 2)
    async with _running(fake.FakeServer(step_s=1.0)) as endpoint:
        slow = await _ask(OpenAIClient(endpoint), timeout_s=0.2)
    assert slow.status == "PeerError"
    assert "0.2 s" in slow.error
    gone = await _ask(OpenAIClient(endpoint))
    assert gone.status == "PeerError"


@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_the_handoff_benchmark_runs_end_to_end(devices: str, tmp_path: Path) -> None:
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shutil.copy(FAKE, package / "api_server.py")
    output = tmp_path / "result.json"
    code = vllm_handoff.main(
        [
            "--vllm-path", str(tmp_path / "packages"), "--devices", devices, "--run", "test",
            "--model", str(save_shape(tmp_path / "tiny", TINY)), "--start-timeout", "30",
            "--lengths", "8", "20", "--requests", "2", "--warmup", "1", "--output-tokens", "4", "--pause", "0",
            "--load", "40:6:4:0.5", "--first-tokens", "8", "--kernel-cache", str(tmp_path / "cache"),
            "--output", str(output),
        ]
    )  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text())
    assert result["config"]["engine"] == "vllm"
    assert result["config"]["gpus"] == len(devices.split(","))
    assert result["config"]["cold_caches"]
    assert result["version"] == "fake"
    assert [row["prompt_tokens"] for row in result["lengths"]] == [8, 20]
    assert all(row["second_token_s"] > row["ttft_s"] > 0 for row in result["lengths"])
    assert result["lengths"][0]["hidden_share"] is None
    summary = result["loads"][0]["summary"]
    assert summary["by_status"] == {"OK": summary["requests"]}


class _FakeLLMEngine:
    """Computes prompts a budget at a time, first come first served, and a token a step for those that are computed."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._running: dict[str, list[int]] = {}

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        assert prompt["type"] == "token"
        self._running[request_id] = [len(prompt["prompt_token_ids"]), params.max_tokens]

    def step(self) -> list[SimpleNamespace]:
        budget, outputs = self._budget, []
        for request_id, left in list(self._running.items()):
            taken = min(budget, left[0])
            left[0] -= taken
            budget -= taken
            if left[0] == 0:
                left[1] -= 1
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])]))
            if left[1] == 0:
                del self._running[request_id]
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)


def test_the_engine_benchmark_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def llm(**settings: Any) -> SimpleNamespace:
        made.append(settings)
        engine = _FakeLLMEngine(settings["max_num_batched_tokens"])
        return SimpleNamespace(llm_engine=engine, apply_model=lambda function: [function(torch.nn.Linear(2, 2))])

    vllm = SimpleNamespace(__version__="fake", LLM=llm, SamplingParams=lambda **values: SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=1))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)  # type: ignore[arg-type]
    output = tmp_path / "result.json"
    code = vllm_engine.main(
        [
            "--model", str(save_shape(tmp_path / "tiny", TINY)), "--prefill", "1x20", "--decode", "1x30", "4x30",
            "--sampled", "4x30", "--repeats", "2", "--decode-repeats", "2", "--steps", "10", "--warmup", "2",
            "--max-num-batched-tokens", "40", "--output", str(output), "--run", "test",
        ]
    )  # fmt: skip
    assert code == 0
    (settings,) = made
    assert not settings["enable_prefix_caching"]
    assert settings["max_num_seqs"] == 4
    result = json.loads(output.read_text())
    assert [row["point"] for row in result["prefill"]] == ["1x20"]
    assert [(row["point"], row["sampled"]) for row in result["decode"]] == [
        ("1x30", False), ("4x30", False), ("4x30", True),
    ]  # fmt: skip
    assert all(row["steps"] == 20 for row in result["decode"])
    assert result["config"]["version"] == "fake"


def test_random_biases_choose_no_experts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 2))
    weights = [layer.weight.clone() for layer in model]
    assert vllm_engine.zero_biases(model) == 2
    assert not model[0].bias.any()
    assert not model[2].bias.any()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))


def test_the_peers_engine_imports_none_of_batons_packages() -> None:
    """It runs where Ray, NIXL's and gRPC's packages, and Baton's own requirements, may not be installed."""
    hidden = ("ray", "nixl", "grpc", "grpc_health", "grpc_reflection", "flashinfer", "torch", "numpy", "yaml")
    hidden += ("attention", "cluster", "kv_transfer", "workers", "protos")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import benchmarks.peers.vllm_engine"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
