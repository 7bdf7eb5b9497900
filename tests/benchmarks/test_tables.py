"""The tables in the docs are those of the result files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    door_tables,
    gpu_change_tables,
    gpu_kernel_tables,
    gpu_tables,
    pool_tables,
    router_tables,
    tables,
)
from benchmarks.disaggregation_cost import LABELS
from benchmarks.environment import Environment

_PAGE = """# Page

before
<!-- table: engine_vs_transformers -->
stale
<!-- end of table -->
between
<!-- table: disaggregation_cost -->
<!-- end of table -->
after
""" + "".join(
    f"<!-- table: {name} -->\n<!-- end of table -->\n"
    for tables_of in (gpu_tables, gpu_change_tables, gpu_kernel_tables, pool_tables, router_tables, door_tables)
    for name in (*tables_of.TABLES, *(door_tables.FRONT_DOOR if tables_of is door_tables else ()))
)


_SCALE: dict[str, Any] = {
    "config": {"workers": 10, "requests": 100},
    "result": {
        "succeeded": 98, "failures": {"WorkerLostError": 2}, "lost": 0, "killed": 3, "scaled": 1, "simulated_s": 60.0,
        "wall_s": 2.0, "requests_per_wall_s": 50.0, "peak_rss_mib": {"10%": 100.0, "100%": 101.0},
    },
}  # fmt: skip


def _saturated(bound: float | None, goodput: float) -> dict[str, Any]:
    return {
        "workload": "long", "max_queue_wait_s": bound, "load": 2.0, "offered_per_s": 80.0, "requests": 100,
        "goodput_per_s": goodput, "succeeded": 60, "failures": {"QueueFullError": 40}, "preempted": 0,
        "ttft_p99_ms": None,
    }  # fmt: skip


def _both_doors() -> dict[str, Any]:
    runs = [{"tokens": 3000, "messages": 1500, "cpu_s": 0.3}]
    doors = {"grpc": runs, "http": runs}
    return {"streams": 4, "length": 9, "cpu_us_per_token": {"grpc": 100.0, "http": 99.0}, "runs": doors}


_CARRIED: dict[str, Any] = {
    "config": {"burst": 4000},
    "points": [
        {
            "streams": streams, "cpu_us_per_token": {"before": 90.0, "after": 60.0, "bare": 30.0},
            "more_tokens_per_cpu_s": {"median": more, "low": 1.3, "high": 1.9},
            "messages_per_token": {"before": 1.0, "after": 0.9, "bare": 1.0},
        }
        for streams, more in ((256, 1.5), (2000, 1.4))
    ],
    "bursts": {"before": {"OK": 3000, "CANCELLED": 1000}, "after": {"OK": 4000}},
}  # fmt: skip


def test_whether_a_goal_of_the_gateway_is_met_is_told() -> None:
    met, missed = door_tables.front_door(_CARRIED).splitlines()[2:]
    assert "**1.50×** | 1.30 … 1.90 | ≥ 1.5× | yes" in met
    assert "**1.40×** | 1.30 … 1.90 | ≥ 1.5× | **no**" in missed
    assert door_tables.bursts(_CARRIED).splitlines()[2:] == ["| before | 1000 | 3000 |", "| after | 0 | 4000 |"]
    more = {"median": 1.03, "low": 1.01, "high": 1.05}
    looked = {
        "cpu_us_per_token": {"nothing": 60.0, "metrics": 61.8, "traces": 61.8, "nothing again": 60.0},
        "ratio": {"metrics": more, "traces": more, "nothing again": {"median": 1.0, "low": 0.9, "high": 1.1}},
        "calls_share": {"metrics": 0.008},
    }
    nothing, metrics, traces, again = door_tables.observing_cost(looked).splitlines()[2:]
    assert "+3.0% | +1.0% … +5.0% | 0.8% | ≤ 2% | **no**" in metrics
    assert "+3.0% | +1.0% … +5.0% |  | ≤ 5% | yes" in traces
    assert "nothing, once more" in again
    assert "nothing" in nothing


def _results(folder: Path, ratio: float = 2.5) -> None:
    environment = Environment.capture(threads=2, argv=["python", "-m", "x"]).to_json()
    side = {"decode_median": 10.0, "total_median": 8.0}
    comparison: dict[str, Any] = {
        "dtype": "float32", "case": "batch 1", "engine": side, "transformers": side, "decode_ratio": ratio,
        "total_ratio": 1.0, "target": 1.0, "equal_jobs": 1, "jobs": [{}],
    }  # fmt: skip
    case = {"model": "100M", "prompt_tokens": 64, "medians": {**dict.fromkeys(LABELS, 0.0125), "kv_bytes": 2048.0}}
    decision = {"workers": 7, "knows": "all", "decision_us": 41.4, "decision_p99_us": 90.0, "requests_per_s": 1e4}
    for name, content in (
        ("engine_vs_transformers", {"comparisons": [comparison]}),
        ("disaggregation_cost", {"cases": [case]}),
        ("router", {"cases": [decision]}),
        ("router_quality", {"cases": []}),
        ("doors", {"points": [_both_doors()]}),
        ("load_tools", {"config": {"requests": 9}, "tools": []}),
        ("front_door", _CARRIED),
        ("saturation", {"cases": [_saturated(2.0, 40.0), _saturated(2.0, 30.0), _saturated(None, 60.0)]}),
        ("simulation_scale", _SCALE),
    ):
        (folder / f"{name}.json").write_text(json.dumps({"environment": environment, **content}))


def _run(page: Path, results: Path, *more: str) -> int:
    return tables.main(["--docs", str(page.parent), "--page", page.name, "--results", str(results), *more])


def test_check_fails_until_the_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(_PAGE)
    _results(tmp_path)
    assert _run(page, tmp_path, "--check") == 1
    assert page.read_text() == _PAGE
    assert "out of date" in capsys.readouterr().err
    assert _run(page, tmp_path) == 0
    assert _run(page, tmp_path, "--check") == 0
    text = page.read_text()
    assert "stale" not in text
    assert "**2.50×**" in text
    assert "| prefill alone | 12.50 |" in text
    assert "| KV cache moved, KiB | 2 |" in text
    assert "| 7 | all | 41 | 90 | 10000 |" in text
    assert "| 4 | 9 tokens | HTTP | 2.0 | 200 | 99 |" in text
    assert "| long | 2 s | 2.00 × | 80.0 | 30.0 | 75% |" in text, "of the peak under the same bound"
    assert "| long | no bound | 2.00 × | 80.0 | 60.0 | 100% |" in text
    assert "| ended in an error | 2 WorkerLostError |" in text
    assert "`python -m x`" in text
    assert all(line in text for line in ("# Page", "before", "between", "after"))


def test_a_new_result_makes_the_page_out_of_date(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(_PAGE)
    _results(tmp_path)
    assert _run(page, tmp_path) == 0
    _results(tmp_path, ratio=3.0)
    assert _run(page, tmp_path, "--check") == 1


@pytest.mark.parametrize("page_text", ["no markers", _PAGE.replace("disaggregation_cost", "unknown")])
def test_a_page_without_the_right_markers_is_refused(
    page_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(page_text)
    _results(tmp_path)
    assert _run(page, tmp_path) == 1
    assert "markers" in capsys.readouterr().err
    assert page.read_text() == page_text


def test_a_missing_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(_PAGE)
    assert _run(page, tmp_path) == 1
    assert "cannot read" in capsys.readouterr().err


def test_the_pages_of_this_repository_are_up_to_date() -> None:
    assert tables.main(["--check"]) == 0
