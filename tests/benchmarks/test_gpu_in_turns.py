"""Both engines in turns, each a stand-in: what is asked of whom, what is kept, what is left out for want of time."""

import argparse
import asyncio
import importlib.util
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_in_turns
from benchmarks.llama_8b import SHAPE, save_shape
from benchmarks.peers.openai_client import Endpoint, OpenAIClient
from benchmarks.running_service import RunningService

TINY = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAKE = Path(__file__).with_name("fake_openai_server.py")
_spec = importlib.util.spec_from_file_location("fake_openai_server", FAKE)
assert _spec is not None
assert _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


def flags(folder: Path, *more: str) -> list[str]:
    package = folder / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shutil.copy(FAKE, package / "api_server.py")
    return [
        "--vllm-path", str(folder / "packages"), "--devices", "0,1", "--dtype", "float32", "--run", "test",
        "--model", str(save_shape(folder / "tiny", TINY)), "--max-model-len", "256", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "64", "--start-timeout", "90", "--first-tokens", "8",
        "--lengths", "8", "20", "--long", "16:1:0", "--requests", "2", "--warmup", "1", "--output-tokens", "4",
        "--pause", "0", "--load", "20:6:4:0.2", "40:6:4:0.1", "--low", "none", "--asked", "tiny:20:6:2000:500",
        "--window", "0.5", "--settle", "0.1", "--tries", "1", "--clients", "1", "--kernel-cache", str(folder / "kc"),
        "--output-folder", str(folder / "out"), *more,
    ]  # fmt: skip


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / f"{name}.json").read_text())
    return found


@asynccontextmanager
async def served_by_a_stand_in(
    args: argparse.Namespace, folder: Path, environ: Any, log: Path, found: dict[str, Any]
) -> AsyncIterator[RunningService]:
    """In the place of `baton up`, which `test_gpu_handoff` starts."""
    listener = await asyncio.start_server(fake.FakeServer(step_s=0.001).handle, "127.0.0.1", 0)
    async with listener:
        found["ready_s"], endpoint = 1.0, Endpoint("127.0.0.1", listener.sockets[0].getsockname()[1], "model")
        yield RunningService(OpenAIClient(endpoint), "", [SimpleNamespace(started=0.0)], 320, 256)  # type: ignore[list-item]


def test_both_engines_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_in_turns.gpu_handoff, "running_service", served_by_a_stand_in)
    asked: list[argparse.Namespace] = []

    async def goodput(run: gpu_in_turns.Run, pair: gpu_in_turns.Up) -> None:
        run.losing.found["sides"].append({"disaggregation": "always"})

    async def sides(args: argparse.Namespace, folder: Path, log: Path, found: Any, save: Any) -> None:
        asked.append(args)
        save()

    monkeypatch.setattr(gpu_in_turns, "pair_goodput", goodput)
    monkeypatch.setattr(gpu_in_turns.gpu_losing_case, "measure", sides)
    assert gpu_in_turns.main(flags(tmp_path, "--seconds", "300", "--alone")) == 0
    for name, gpus in (("baton_1gpu", 1), ("baton_undivided", 1), ("baton_2gpu", 2)):
        _check_service(result(tmp_path, f"gpu_service_{name}"), "baton", gpus, alone=gpus == 2, loads=gpus == 2)
    for name, gpus in (("vllm_1gpu", 1), ("vllm_2gpu", 2), ("vllm_push_2gpu", 2)):
        found = result(tmp_path, f"gpu_service_{name}")
        _check_service(found, "vllm", gpus, alone=False, loads=gpus == 2)
        assert found["config"]["connector"] == ("NixlPushConnector" if "push" in name else "NixlConnector")
    assert "router.disaggregation=never" in result(tmp_path, "gpu_service_baton_undivided")["config"]["set"]
    assert [args.sides for args in asked] == [["never", "auto"]]
    for path in (tmp_path / "out").iterdir():
        found = json.loads(path.read_text())
        assert str(tmp_path) not in json.dumps({**found, "environment": None}), "results name no folder"
        assert "first_token_s" not in found, "services have waited for others"


def _check_service(found: dict[str, Any], engine: str, gpus: int, alone: bool, loads: bool) -> None:
    assert (found["config"]["engine"], found["config"]["gpus"], found["config"]["run"]) == (engine, gpus, "test")
    assert len(found["first"]["ttft_s"]) == len(found["first"]["second_token_s"]) == 3
    assert [(row["prompt_tokens"], len(row["requests"])) for row in found["lengths"]] == [(8, 2), (20, 1)]
    assert [row["alone_ttft_s"] is not None for row in found["lengths"]] == [alone, False]
    assert [load["load"]["rate"] for load in found.get("loads", [])] == ([20.0, 40.0] if loads else [])
    for load in found.get("loads", []):
        assert load["summary"]["by_status"] == {"OK": load["summary"]["requests"]}


def test_on_one_card_pairs_share_it(tmp_path: Path) -> None:
    words = flags(tmp_path, "--seconds", "60", "--parts", "vllm", "--single-kv-gb", "1", "--pair-kv-gb", "2")
    words[words.index("--devices") + 1] = "0"
    assert gpu_in_turns.main(words) == 0
    kept = {"one": ("0", 1.0), "pair": ("0,0", 2.0), "push_pair": ("0,0", 2.0)}
    for name, (devices, gigabytes) in kept.items():
        config = result(tmp_path, f"gpu_one_card_vllm_{name}")["config"]
        assert (config["devices"], config["gpus"], config["kv_cache_gb"]) == (devices, 1, gigabytes)


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_in_turns.main(flags(tmp_path, "--seconds", "1", "--parts", "vllm")) == 0
    said = capsys.readouterr().err
    assert "left out for want of time: vLLM's lengths" in said
    assert "left out for want of time: the push connector's loads" in said


def test_a_service_that_does_not_start_ends_none_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(tmp_path, "--seconds", "60", "--parts", "vllm")
    server = tmp_path / "packages" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    refusal = 'if "NixlPushConnector" in str(__import__("sys").argv): raise SystemExit("no such connector")\n'
    text = server.read_text()
    server.write_text(text.replace("import argparse\n", f"import argparse\n{refusal}", 1))
    assert gpu_in_turns.main(words) == 0
    assert "did not start: the server ended with 1: no such connector" in capsys.readouterr().err
    assert [row["prompt_tokens"] for row in result(tmp_path, "gpu_service_vllm_2gpu")["lengths"]] == [8, 20]
    assert not (tmp_path / "out" / "gpu_service_vllm_push_2gpu.json").exists()
