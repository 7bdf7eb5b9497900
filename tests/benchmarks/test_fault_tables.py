"""The matrix names every combination, and its tables say what was run, what was not, and why."""

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.fault_tables import kill_matrix, storms
from benchmarks.faults.cells import all_cells
from benchmarks.faults.clients import Question

ENVIRONMENT = Environment.capture(threads=1, argv=["python", "-m", "x"]).to_json()
RUN = {
    "cell": "decode/killed/while/new", "right": 99, "wrong": 0, "failed": {"UNAVAILABLE": 2}, "noticed_s": 0.05,
    "slowest_s": 7.44, "recovered_s": 9.0, "blocks_missing": 0, "environment": ENVIRONMENT,
}  # fmt: skip


def test_every_combination_is_a_cell_or_has_a_reason() -> None:
    cells = list(all_cells())
    assert len(cells) == 6 * 3 * 3 * 2
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.harm for cell in cells if cell.not_run} == {"frozen", "reset"}
    for target in ("prefill", "decode", "both", "gateway", "follower", "node"):
        for harm in ("killed", "frozen", "reset"):
            of_both = [cell for cell in cells if (cell.target, cell.harm) == (target, harm)]
            assert sum(not cell.not_run for cell in of_both) >= 3, "at each moment at least at one address"


def test_an_answer_is_right_only_as_a_whole() -> None:
    short, long = Question("…", "4127"), Question("…", "4127", (1, 2, 3))
    assert short.is_right(" 4127", [9, 9])
    assert not short.is_right(" 41275", [9, 9])
    assert not short.is_right(" 412", [9, 9])
    assert long.is_right(" 4127 and on", [1, 2, 3])
    assert not long.is_right(" 4127 and on", [1, 2, 4])
    assert not long.is_right(" 4128 and on", [1, 2, 3])


def test_the_matrix_as_a_table(tmp_path: Path) -> None:
    assert kill_matrix(tmp_path) == "No result is kept yet."
    not_run = {"cell": "gateway/frozen/while/new", "not_run": "there is none"}
    (tmp_path / "kill_matrix.json").write_text(json.dumps({"cells": [RUN, not_run]}))
    text = kill_matrix(tmp_path)
    assert "1 cells: 99 right answers, 0 wrong ones, 0 blocks missing." in text
    assert "| decode | killed | while | new | 99 | 0 | 2 UNAVAILABLE | 0.05 | 7.4 | 9.0 | 0 |" in text
    assert "- Not run: gateway frozen, new address (while): there is none." in text
    assert "`python -m x`" in text


def _held(rss: int) -> dict[str, Any]:
    books = dict.fromkeys(("calls", "queued", "attempts", "booked_requests", "booked_blocks"), 0)
    process = {"rss": rss, "descriptors": 40, "threads": 9}
    return {"processes": {"gateway": process}, "blocks_missing": 0, "books": {**books, "tenant_accounts": 3}}


def test_storms_as_tables(tmp_path: Path) -> None:
    assert storms(tmp_path) == "No result is kept yet."
    storm = {
        "storm": "abort", "clients": 1000, "rounds": 10, "right": 0, "wrong": 0, "failed": {}, "seconds": None,
        "left": {"amid tokens": 9}, "idle_s": [0.5, 0.25], "before": _held(500_000_000), "after": _held(501_000_000),
        "grown": {"cluster.api.Thing": 2}, "environment": ENVIRONMENT,
    }  # fmt: skip
    overload = {
        **storm, "storm": "overload", "saturating_per_s": 54.0, "offered_per_s": 108.0, "sent": 32_400, "right": 7,
        "seconds": {"p50": 85.9, "p99": 161.7, "max": 223.4}, "failed": {"DEADLINE_EXCEEDED": 3}, "left": {},
    }  # fmt: skip
    (tmp_path / "storms.json").write_text(json.dumps({"storms": [storm, overload]}))
    text = storms(tmp_path)
    assert "| 2 × saturation (54/s) for 300 s | 7 | 0 | 3 DEADLINE_EXCEEDED | — | 85.90 | 161.70 | 223.40 |" in text
    assert "| 1000 clients leave at once, 10 times | 0 | 0 | — | 9 amid tokens | — | — | — | 0.5 |" in text
    assert "| abort | gateway | 500 | 501 | 40 | 40 | 9 | 9 |" in text
    assert "| abort | 0 | 0 | 3 → 3 | 2 Thing |" in text
