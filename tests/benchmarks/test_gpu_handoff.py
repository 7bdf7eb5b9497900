"""The benchmark of the handoff: a service started, measured and stopped; servers that do not start or do not stop."""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_handoff
from benchmarks.llama_8b import SHAPE, save_shape
from benchmarks.server_process import descendants, server_process
from benchmarks.service_points import Load, LongPrompts
from workers.errors import ConfigError

TINY = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_runs_end_to_end(tmp_path: Path) -> None:
    output, before = tmp_path / "result.json", descendants(os.getpid())
    settings = ("handoff.connector=local", "prefill.num_blocks=32", "decode.num_blocks=64", "decode.device=cpu")
    code = gpu_handoff.main(
        [
            "--devices", "0", "--dtype", "float32", "--model", str(save_shape(tmp_path / "tiny", TINY)),
            "--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "4", "--start-timeout", "90",
            "--lengths", "20", "100", "--requests", "2", "--warmup", "1", "--output-tokens", "5", "--alone",
            "--pause", "0",
            "--load", "8:24:6:1", "--first-tokens", "8", "--short", "8:8:4:1",
            "--kernel-cache", str(tmp_path / "kernels"),
            "--output", str(output), "--run", "test", *(f"--set={setting}" for setting in settings),
        ]
    )  # fmt: skip
    assert code == 0
    assert not descendants(os.getpid()).keys() - before.keys()
    result = json.loads(output.read_text())
    assert (result["config"]["gpus"], result["config"]["cold_caches"]) == (1, True)
    assert result["first_token_s"] > 0
    assert [worker["role"] for worker in result["workers"]] == ["prefill", "decode"]
    assert [row["prompt_tokens"] for row in result["lengths"]] == [20, 100]
    for row in result["lengths"]:
        assert row["second_token_s"] > row["ttft_s"] > 0
        assert row["alone_ttft_s"] > 0
        assert 0 <= row["hidden_share"] <= 1
        assert len(row["requests"]) == len(row["alone"]) == 2
    for load, tokens in ((result["loads"][0], 6), (result["short"], 4)):
        assert load["summary"]["by_status"] == {"OK": load["summary"]["requests"]}
        assert {row["output_tokens"] for row in load["requests"]} == {tokens}
        assert len(load["itl_quantiles_s"]) == 201


def test_compiled_kernels_are_looked_for_where_they_will_be_put(tmp_path: Path) -> None:
    environ, cold = gpu_handoff.kernel_caches(tmp_path / "kernels")
    assert cold
    place = Path(environ["TRITON_CACHE_DIR"])
    (place / "kernel").touch()
    assert gpu_handoff.kernel_caches(tmp_path / "kernels") == (environ, False)
    assert gpu_handoff.kernel_caches(None) == ({}, None)


@pytest.mark.parametrize("text", ["8:10:10", "8:10:10:0", "a:10:10:5", "8:-1:10:5", "8:1.5:10:5"])
def test_a_load_is_four_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        Load.parse(text)


@pytest.mark.parametrize("text", ["100", "100:0:1", "100:1:-1", "a:1:1"])
def test_long_prompts_are_three_numbers_with_a_request(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        LongPrompts.parse(text)


def test_a_server_that_ends_or_takes_too_long_is_reported_with_its_log(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('no such model', flush=True); raise SystemExit(3)"]
    with server_process(words, {}, tmp_path / "log") as server, pytest.raises(ConfigError, match="3: no such model"):
        asyncio.run(server.wait_for(lambda: None, 30.0))
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        server_process(words, {}, tmp_path / "log") as server,
        pytest.raises(ConfigError, match=r"not ready after 0\.2"),
    ):
        asyncio.run(server.wait_for(lambda: None, 0.2))


def test_a_stopped_server_takes_its_children_with_it(tmp_path: Path) -> None:
    child = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); os.setsid(); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('up', flush=True); "
    others = descendants(os.getpid()).keys()  # of tests that ran before
    with server_process([sys.executable, "-c", parent + "import time; time.sleep(60)"], {}, tmp_path / "log") as server:
        asyncio.run(server.wait_for(lambda: server.text() or None, 30.0))
        family = {pid: began for pid, began in descendants(os.getpid()).items() if pid not in others}
        assert len(family) == 2
    assert not family.keys() & descendants(os.getpid()).keys()
    give_up_at = time.monotonic() + 20.0
    while any(runs(pid) for pid in family):  # a signal takes its time where others use the cores
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
