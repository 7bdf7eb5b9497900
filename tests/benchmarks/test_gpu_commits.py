from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_commits import compare, main

ENGINE = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--output", type=pathlib.Path)
parser.add_argument("--scale", type=float)
args = parser.parse_args()
row = {{"point": "1x2048", "seconds": [{seconds} * args.scale] * 3}}
step = {{"point": "16x192", "sampled": True, "mean": 2.0 * {seconds}}}
args.output.write_text(json.dumps({{"prefill": [row], "decode": [step]}}))
"""


def checkout(folder: Path, seconds: float) -> Path:
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "gpu_engine.py").write_text(ENGINE.format(seconds=seconds))
    return folder


def test_each_checkout_runs_its_own_engine_by_turns(tmp_path: Path, monkeypatch) -> None:
    before, after = checkout(tmp_path / "a", 1.0), checkout(tmp_path / "b", 1.5)
    output = tmp_path / "result.json"
    arguments = ["--before", str(before), "--before-name", "a1", "--after", str(after), "--after-name", "b2"]
    assert main([*arguments, "--output", str(output), "--rounds", "2", "--", "--scale", "2"]) == 0
    result = json.loads(output.read_text())
    assert (result["config"]["before"], result["config"]["after"]) == ("a1", "b2")
    assert [row["point"] for row in result["points"]] == ["prefill 1x2048", "decode 16x192 sampled"]
    assert result["points"][0]["before"] == [2.0, 2.0]
    assert all(row["ratio"] == 1.5 for row in result["points"])


def test_a_side_that_fails_is_told(tmp_path: Path) -> None:
    broken = checkout(tmp_path / "a", 1.0)
    (broken / "benchmarks" / "gpu_engine.py").write_text("raise SystemExit(3)")
    arguments = ["--before", str(broken), "--before-name", "a", "--after", str(broken), "--after-name", "b"]
    assert main([*arguments, "--output", str(tmp_path / "r.json"), "--rounds", "1"]) == 1
    assert json.loads((tmp_path / "r.json").read_text())["points"] == []


def test_only_what_both_sides_have_is_compared() -> None:
    rounds = {"before": [{"a": 1.0, "b": 1.0}, {"a": 3.0}], "after": [{"a": 4.0}]}
    assert compare(rounds) == [{"point": "a", "before": [1.0, 3.0], "after": [4.0], "ratio": 2.0}]
