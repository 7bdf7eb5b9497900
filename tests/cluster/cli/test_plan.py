"""`baton plan`: of workers that are kept in a file, and of those of a running service."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.api import WorkerStatus
from cluster.cli.main import main
from cluster.planning.measured import fleet_of, read_workers
from cluster.wire import convert
from workers.errors import ConfigError
from workers.messages import Load
from workers.runner.step_times import StepTimes

PREFILL = WorkerStatus(
    "p", "prefill", "ready", "GPU", "X", 64, Load(4096, 4096), "a", 16, StepTimes(prefill=((100, 0.01), (1000, 0.1)))
)
DECODE = WorkerStatus(
    "d", "decode", "ready", "GPU", "X", 64, Load(10_000, 90), "", 32, StepTimes((), ((1, 0.01), (11, 0.02)), 1e-6)
)
WORKLOAD = ("--prompt-tokens", "1000", "--output-tokens", "11", "--ttft-ms", "500", "--itl-ms", "100")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """What `baton status --json` writes."""
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({"model": {}, "workers": [asdict(PREFILL), asdict(DECODE)]}))
    return path


def test_what_workers_measured_goes_over_the_wire_and_into_a_file(kept: Path) -> None:
    assert convert.workers_from_proto(map(convert.worker_to_proto, (PREFILL, DECODE))) == [PREFILL, DECODE]
    assert read_workers(kept) == [PREFILL, DECODE]


def test_the_slowest_worker_counts() -> None:
    slow = replace(PREFILL, step_times=StepTimes(prefill=((100, 0.03), (1000, 0.2))))
    fleet = fleet_of([PREFILL, slow, DECODE], tokens=1000)
    assert fleet.prefill.seconds(1000) == pytest.approx(0.2)
    assert (fleet.decode.max_num_seqs, fleet.decode.kv_tokens) == (32, 640_000)
    assert fleet.decode.step_seconds(6.0, 1000.0) == pytest.approx(0.016)


def test_who_has_not_measured_cannot_be_planned_with() -> None:
    with pytest.raises(ConfigError, match="how long decode takes"):
        fleet_of([PREFILL, replace(DECODE, step_times=StepTimes())])
    with pytest.raises(ConfigError, match="how long prefill takes"):
        fleet_of([DECODE])
    both = replace(DECODE, step_times=replace(DECODE.step_times, prefill=((1000, 0.2),)))
    assert fleet_of([both]).prefill.seconds(1000) == pytest.approx(0.2), "a service without a prefill pool"


def test_the_table_names_the_split_and_why(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--workers", str(kept), "--gpus", "4", *WORKLOAD]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "→ 3P1D" in out
    assert "3 prefill and 1 decode workers" in out
    assert "prefill bounds it" in out


def test_json_is_json_even_past_saturation(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--workers", str(kept), "--gpus", "3", "--rate", "15", "--mixed", "--json", *WORKLOAD]) == 0
    answer: Any = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    plans = {plan["split"]: plan for plan in answer["plans"]}
    assert plans[answer["recommended"]]["goodput_per_s"] == max(plan["goodput_per_s"] for plan in plans.values())
    assert set(plans) == {"1P2D", "2P1D", "3 mixed"}
    assert plans["1P2D"]["saturated_per_s"] == pytest.approx(10.0)
    assert plans["1P2D"]["at"]["prefill"]["ttft_s"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gpus", "1", *WORKLOAD), "1 GPUs"),
        (("--gpus", "2", "--rate", "0", *WORKLOAD), "--rate is 0"),
        (("--gpus", "2", *WORKLOAD[:-1], "0"), "more than 0"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(
    kept: Path, arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--workers", str(kept), *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_file_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"workers": [{}]}')
    for name in ("x.json", "none.json"):
        assert main(["plan", "--workers", str(tmp_path / name), "--gpus", "2", *WORKLOAD]) == 1
        assert name in capsys.readouterr().err
