"""The tables that put Baton beside vLLM: from result files as the benchmarks write them, and from those that lack."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_tables
from benchmarks.environment import Environment
from workers.errors import ConfigError


def _write(folder: Path, name: str, engine: str, content: dict[str, Any], run: str = "r1", **config: Any) -> None:
    environment = Environment.capture(threads=None, argv=["python", "-m", "x"]).to_json()
    whole = {
        "environment": environment,
        "config": {"engine": engine, "run": run, "note": "", "gpu_names": ["NVIDIA H200"], **config},
        **content,
    }
    (folder / name).write_text(json.dumps(whole))


def _engine(folder: Path, engine: str, scale: float, run: str = "r1") -> None:
    limits = {"limits": {"copy_bytes_per_s": 4.2e12, "matrix_flops_per_s": 7.6e14}} if engine == "baton" else {}
    limit = {"limit_s": 0.004, "of_limit": 0.8} if engine == "baton" else {}
    decode = [{"point": "64x192", "sampled": sampled, "mean": 0.005 * scale, **limit} for sampled in (False, True)]
    prefill = [{"point": "1x2048", "tokens_per_s": 44000.0 / scale, **limit}]
    _write(folder, f"gpu_engine_{engine}.json", engine, {**limits, "prefill": prefill, "decode": decode}, run)


def _service(folder: Path, engine: str, gpus: int, ttft_s: float, rate: float, cold: bool = True) -> None:
    percentiles = {"ttft": {"p50": ttft_s, "p99": 2 * ttft_s}, "itl": {"p50": 0.006, "p99": 0.0075}}
    percentiles["e2e"] = {"p50": 1.0, "p99": 2.0}
    load = {"rate": rate, "prompt_tokens": 4000, "output_tokens": 200, "duration_s": 45.0}
    asked = {"load": load, "summary": {**percentiles, "requests": 10, "by_status": {"OK": 9, "UNAVAILABLE": 1}}}
    length = {
        "prompt_tokens": 2048, "ttft_s": ttft_s, "second_token_s": ttft_s + 0.006, "alone_ttft_s": ttft_s,
        "exposed_s": 0.001, "hidden_share": 0.97 if engine == "baton" else None,
    }  # fmt: skip
    first = {"prompt_tokens": 512, "ttft_s": [2 * ttft_s, 1.1 * ttft_s, ttft_s], "second_token_s": [0.3, 0.1, 0.2]}
    content = {"lengths": [length], "loads": [asked, {**asked, "load": {**load, "rate": 2 * rate}}], "first": first}
    _write(folder, f"gpu_service_{engine}_{gpus}gpu.json", engine, content)
    _write(folder, f"gpu_start_{engine}_{gpus}gpu.json", engine, {"first_token_s": 40.0}, cold_caches=cold)


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_engine_is_judged_by_its_ratio_to_the_peer(tmp_path: Path) -> None:
    _engine(tmp_path, "baton", 1.0)
    _engine(tmp_path, "vllm", 1.1)
    header, _, prefill, decode, sampled = _rows(gpu_tables.engine(tmp_path))
    assert header[-1] == "met"
    assert prefill == ["1 × 2048", "prefill, tok/s", "44.0k", "40.0k", "**1.10**", "512.0k", "80%", "≥ 1.00", "yes"]
    assert decode == ["64 × 192", "decode step, ms", "5.00", "5.50", "**0.91**", "4.00", "80%", "≤ 0.95", "yes"]
    assert sampled[-2:] == ["", ""]  # no goal was set for it
    _engine(tmp_path, "vllm", 1.0)
    text = gpu_tables.engine(tmp_path)
    assert "copies at 4.20 TB/s, matrices at 760 TFLOP/s" in text
    assert "- vllm: on NVIDIA H200; `python -m x`" in text
    *_, prefill, decode, _ = _rows(text)
    assert (prefill[-1], decode[-1]) == ("yes", "**no**")


def test_figures_without_a_peer_stand_alone(tmp_path: Path) -> None:
    assert all(make(tmp_path) == "No result is kept yet." for make in gpu_tables.TABLES.values())
    _engine(tmp_path, "baton", 1.0)
    _service(tmp_path, "baton", 2, 0.052, 8.0)
    assert _rows(gpu_tables.engine(tmp_path))[3][3:5] == ["—", "—"]
    (row,) = _rows(gpu_tables.handoff(tmp_path))[2:]
    assert row == ["2048 tokens", "—", "52.0", "**—**", "≤ 3", "", "—", "52.0", "—", "—", "—", "—"]


def test_the_handoff_is_the_difference_between_two_gpus_and_one(tmp_path: Path) -> None:
    for engine, one, two in (("baton", 0.050, 0.052), ("vllm", 0.051, 0.0735)):
        _service(tmp_path, engine, 1, one, 4.0)
        _service(tmp_path, engine, 2, two, 8.0)
    (row,) = _rows(gpu_tables.handoff(tmp_path))[2:]
    assert row[1:6] == ["50.0", "52.0", "**2.00**", "≤ 3", "yes"]
    assert row[6:] == ["—", "52.0", "51.0", "73.5", "22.5", "**0.71**"]
    (row,) = _rows(gpu_tables.second_token(tmp_path))[2:]
    assert row[1:] == ["56.0", "58.0", "2.00", "57.0", "79.5", "22.5", "1.00", "97.0%", "≥ 95%", "yes"]
    loads = _rows(gpu_tables.load(tmp_path))
    assert [row[0] for row in loads if "in, " in row[0]] == [
        "4000 in, 200 out, 8/s for 45 s", "4000 in, 200 out, 16/s for 45 s",
    ]  # fmt: skip
    rows = {row[0]: row[1:] for row in loads}
    assert rows["TTFT p50, ms"] == ["52.0", "73.5", "**0.71**", "≤ 73.5", "yes"]
    assert rows["ITL p99, ms"] == ["7.50", "7.50", "**1.00**", "≤ 8", "yes"]
    assert rows["requests that succeeded"][:2] == ["9 of 10", "9 of 10"]
    assert "| one | empty | 40.0 s | 40.0 s | **1.00** | < 60 s | yes |" in gpu_tables.start(tmp_path)


def test_the_first_request_of_a_pair_stands_beside_a_later_one(tmp_path: Path) -> None:
    _service(tmp_path, "baton", 2, 0.05, 8.0)
    _service(tmp_path, "vllm", 2, 0.2, 8.0)
    (tmp_path / "gpu_service_vllm_2gpu.json").rename(tmp_path / "gpu_service_vllm_push_2gpu.json")
    baton, push = _rows(gpu_tables.first_request(tmp_path))[2:]
    assert baton == ["Baton, 1P1D", "512 tokens", "100.0", "50.0", "50.0", "300.0", "100.0", "200.0"]
    assert push[0] == "vLLM, 1P1D, NixlPushConnector"


def test_one_worker_for_both_and_writes_of_many_layers_stand_beside_the_pair(tmp_path: Path) -> None:
    _service(tmp_path, "baton", 1, 0.050, 4.0)
    _service(tmp_path, "baton", 2, 0.052, 8.0)
    (tmp_path / "gpu_service_baton_1gpu.json").rename(tmp_path / "gpu_service_baton_undivided.json")
    (row,) = _rows(gpu_tables.handoff(tmp_path))[2:]
    assert row[1:3] == ["—", "52.0"]
    assert row[6] == "50.0"
    lengths = [
        {"prompt_tokens": tokens, "ttft_s": 0.2, "alone_ttft_s": 0.19, "second_token_s": 0.21} for tokens in (8000, 512)
    ]
    groups = [{"layers_per_group": layers, "lengths": lengths} for layers in (32, 1)]
    _write(tmp_path, "gpu_handoff_group_sizes.json", "baton", {"groups": groups})
    rows = _rows(gpu_tables.group_sizes(tmp_path))[2:]
    assert [row[:2] for row in rows] == [[f"{n} tokens", g] for n in (512, 8000) for g in ("1", "32")]
    assert rows[0][2:] == ["200.0", "190.0", "**10.00**", "210.0"]


def test_starts_are_compared_only_where_both_began_with_the_same_caches(tmp_path: Path) -> None:
    _service(tmp_path, "baton", 2, 0.05, 8.0, cold=False)
    _service(tmp_path, "vllm", 2, 0.05, 8.0, cold=True)
    assert "| 1P1D on two | filled | 40.0 s | — | — | < 30 s | **no** |" in gpu_tables.start(tmp_path)


def test_results_of_two_runs_are_never_put_side_by_side(tmp_path: Path) -> None:
    _engine(tmp_path, "baton", 1.0)
    _engine(tmp_path, "vllm", 1.0, run="r2")
    with pytest.raises(ConfigError, match="different runs"):
        gpu_tables.engine(tmp_path)
