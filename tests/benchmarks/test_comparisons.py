"""The two contests: the engine alone against transformers, and the account of a request's time."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.disaggregation_cost import Case as CostCase
from benchmarks.disaggregation_cost import Cost
from benchmarks.engine_alone import BatchRun, EngineAlone, Job
from benchmarks.engine_vs_transformers import Case, Comparison, Measurement, compare, make_cases, noise, verdicts
from benchmarks.environment import Environment
from benchmarks.measure import Row
from benchmarks.transformers_generate import TransformersGenerate
from cluster.api import RequestReport

LENGTHS = ((5, 9), (40, 3), (17, 1), (3, 14))


def jobs(vocab_size: int) -> tuple[Job, ...]:
    rng = random.Random(0)
    return tuple(Job(tuple(rng.randrange(3, vocab_size) for _ in range(p)), o) for p, o in LENGTHS)


def test_both_sides_make_the_same_tokens_from_mixed_lengths(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("llama")
    engine = EngineAlone(checkpoint, max_num_seqs=4, max_model_len=128)
    case = Case("mixed", jobs(engine.vocab_size), target=0.0)
    found = compare(case, "float32", engine, TransformersGenerate(checkpoint), repeats=2)
    assert found.equal_jobs == len(LENGTHS)
    assert len(found.engine.decode_tokens_per_s) == len(found.transformers.total_tokens_per_s) == 2
    assert verdicts([found]) == []
    assert [entry["output_tokens"] for entry in found.to_json()["jobs"]] == [9, 3, 1, 14]
    assert engine.prefill_alone((5, 6, 7)) > 0


class _Scripted:
    def __init__(self, token: int, total_s: float, decode_s: float) -> None:
        self._values = token, total_s, decode_s

    def run(self, jobs: tuple[Job, ...]) -> BatchRun:
        token, total_s, decode_s = self._values
        return BatchRun(tuple((token,) * job.max_tokens for job in jobs), total_s, decode_s)


def test_rates_count_wanted_tokens_and_targets_and_tokens_are_judged() -> None:
    case = Case("two", (Job((1,), 5), Job((1,), 3)), target=2.0)
    found = compare(case, "float32", _Scripted(1, 2.0, 1.0), _Scripted(1, 4.0, 3.0), repeats=3)
    assert (found.engine.decode, found.transformers.decode) == (6.0, 2.0)  # 4 + 2 tokens after the first ones
    assert (found.engine.total, found.transformers.total) == (4.0, 2.0)
    assert (found.decode_ratio, found.total_ratio) == (3.0, 2.0)
    assert verdicts([found]) == []
    slow = compare(case, "float32", _Scripted(1, 2.0, 2.0), _Scripted(2, 4.0, 3.0), repeats=1)
    assert len(verdicts([slow])) == 2
    assert len(verdicts([replace(slow, dtype="bfloat16")])) == 1  # rounding may decide near ties there
    assert not slow.to_json()["target_met"]


def test_runs_that_differ_too_much_are_called_noise() -> None:
    case = Case("one", (Job((1,), 5),), target=1.0)
    quiet, noisy = Measurement((10.0, 9.0, 11.0), (1.0,)), Measurement((10.0, 2.0, 11.0), (1.0,))
    assert (quiet.decode, quiet.spread) == (10.0, 0.2)
    assert noise([Comparison(case, "float32", quiet, quiet, 1)]) == []
    found = noise([Comparison(case, "float32", quiet, noisy, 1)])
    assert len(found) == 1
    assert "runs of transformers differ by 90%" in found[0]


def test_cases_follow_the_seed() -> None:
    assert make_cases(1) == make_cases(1) != make_cases(2)
    assert [(len(case.jobs), case.target) for case in make_cases(0)] == [(1, 1.0), (8, 1.5)]
    assert len({(len(job.prompt), job.max_tokens) for job in make_cases(0)[1].jobs}) == 8


def _row(**report: float) -> Row:
    account = RequestReport("p", "d", **report)  # type: ignore[arg-type]
    return Row(
        0, 0.0, 0.0, first_token_s=0.5, last_token_s=0.75, ended_s=0.8, output_tokens=4, itl_s=[0.125, 0.0625, 0.0625],
        finish_reason="length", report=account,
    )  # fmt: skip


def test_the_parts_of_time_to_first_token_add_up() -> None:
    row = _row(ttft_s=0.4, queue_s=0.05, prefill_s=0.3, transfer_s=0.2, exposed_transfer_s=0.01, first_decode_s=0.1)
    cost = Cost.of(row, _row(prefill_s=0.28), prefill_alone=0.25)
    assert cost.front + cost.worker_calls + cost.queues + cost.prefill == pytest.approx(cost.ttft)
    medians = CostCase("m", 64, (cost,)).medians
    parts = ("front", "worker_calls", "queues", "added_by_actor", "added_by_push")
    assert sum(medians[part] for part in parts) == pytest.approx(medians["added_ttft"])
    assert medians["added_first_itl"] == pytest.approx(0.0625)


def test_a_failed_request_is_no_measurement() -> None:
    row = _row(ttft_s=0.4)
    for broken in (replace(row, status="UNAVAILABLE"), replace(row, report=None), replace(row, itl_s=[0.1])):
        with pytest.raises(ValueError, match="cannot be accounted for"):
            Cost.of(broken, row, 0.1)
    with pytest.raises(ValueError, match="cannot be accounted for"):
        Cost.of(row, replace(row, report=None), 0.1)


@pytest.mark.parametrize(
    "argv",
    [
        ["bench", "--token", "hush", "--rate", "3"],
        ["bench", "--token=hush", "--rate", "3"],
        ["bench", "--tok", "hush", "--rate", "3"],
    ],
)
def test_the_command_in_a_result_has_no_token(argv: list[str]) -> None:
    command = Environment.capture(None, argv).command
    assert "hush" not in command
    assert "--rate 3" in command
