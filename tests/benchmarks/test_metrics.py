"""Percentiles, throughput and goodput of rows made by hand."""

import pytest

from benchmarks.measure import Row, intervals
from benchmarks.metrics import Objective, Percentiles, summarize
from cluster.api import RequestReport
from workers.errors import ConfigError

REPORT = RequestReport("p", "d", queue_s=0.25, exposed_transfer_s=0.125, kv_bytes=64)


def row(index: int, ttft: float, itl: list[float], **more: object) -> Row:
    """Due at `index` seconds, the first token `ttft` later, then one token per interval."""
    first = index + ttft
    last = first + sum(itl)
    values: dict[str, object] = {
        "first_token_s": first, "last_token_s": last, "ended_s": last, "prompt_tokens": 10,
        "output_tokens": 1 + len(itl), "itl_s": itl, "longest_gap_s": max(itl, default=0.0), "finish_reason": "length",
        "report": REPORT,
    }  # fmt: skip
    return Row(index, float(index), float(index), **{**values, **more})  # type: ignore[arg-type]


def failed(index: int, status: str) -> Row:
    return Row(index, float(index), float(index), status=status, error="no", ended_s=index + 0.5)


def test_percentiles_interpolate_between_samples() -> None:
    found = Percentiles.of([*range(101)])
    assert found == Percentiles(101, 50.0, 50.0, 90.0, 95.0, 99.0, 100.0)
    between = Percentiles.of([3.0, None, 1.0])
    assert between is not None
    assert (between.count, between.mean, between.p50, between.p90) == (2, 2.0, 2.0, pytest.approx(2.8))
    assert Percentiles.of([None]) is None


def test_itl_of_messages_with_several_tokens_adds_up() -> None:
    assert intervals([(1.0, 1), (1.5, 1), (2.5, 4), (2.75, 1)]) == [0.5, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert intervals([(1.0, 3), (2.0, 1)]) == [0.0, 0.0, 1.0]
    assert intervals([(1.0, 1)]) == []
    assert intervals([]) == []


def test_summary_counts_every_request_and_measures_the_good_ones() -> None:
    rows = [row(0, 1.0, [0.5, 0.5]), row(1, 3.0, [0.25]), failed(2, "UNAVAILABLE"), failed(3, "UNAVAILABLE")]
    found = summarize(rows, duration_s=4.0)
    assert found.requests == 4
    assert found.by_status == {"OK": 2, "UNAVAILABLE": 2}
    assert (found.requests_per_s, found.output_tokens_per_s, found.prompt_tokens_per_s) == (0.5, 1.25, 5.0)
    assert found.ttft is not None
    assert (found.ttft.count, found.ttft.p50, found.ttft.max) == (2, 2.0, 3.0)
    assert found.itl is not None
    assert (found.itl.count, found.itl.p50) == (3, 0.5)
    assert found.tpot is not None
    assert (found.tpot.count, found.tpot.mean) == (2, 0.375)
    assert found.e2e is not None
    assert found.e2e.max == 3.25
    assert found.queue is not None
    assert found.queue.p99 == 0.25
    assert found.handoff is not None
    assert found.handoff.p99 == 0.125
    assert found.goodput is None


def test_tokens_of_a_request_that_failed_later_were_made_all_the_same() -> None:
    broken = row(0, 1.0, [0.5], status="UNAVAILABLE", finish_reason=None)
    found = summarize([broken], duration_s=2.0)
    assert (found.requests_per_s, found.output_tokens_per_s) == (0.0, 1.0)
    assert found.ttft is None


def test_a_run_without_requests_has_no_numbers() -> None:
    found = summarize([], duration_s=0.0, objective=Objective(ttft=1.0))
    assert (found.requests, found.by_status, found.ttft) == (0, {}, None)
    assert found.goodput is not None
    assert found.goodput.fraction == 0.0


def test_a_request_without_handoff_is_no_handoff_of_zero_seconds() -> None:
    alone = row(0, 1.0, [], report=RequestReport("p", ""))
    assert summarize([alone], 1.0).handoff is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft=1000", [0]),  # request 0 meets it exactly, 1 does not, 2 failed
        ("ttft=3000", [0, 1]),
        ("itl=300", [1]),  # one interval of request 0 is longer, though its mean is below
        ("tpot=300", [0, 1]),
        ("e2e=1600", [0]),
        ("ttft=3000,itl=500,tpot=250", [1]),
        ("ttft=1000,itl=300", []),
    ],
)
def test_goodput_counts_requests_that_meet_all_limits(slo: str, good: list[int]) -> None:
    rows = [row(0, 1.0, [0.5, 0.02]), row(1, 3.0, [0.25]), failed(2, "RESOURCE_EXHAUSTED")]
    objective = Objective.parse(slo)
    assert [r.index for r in rows if objective.met_by(r)] == good
    found = summarize(rows, 2.0, objective).goodput
    assert found is not None
    assert (found.requests, found.requests_per_s) == (len(good), len(good) / 2)
    assert found.fraction == pytest.approx(len(good) / 3)


def test_correct_fraction_is_of_the_answers_that_can_be_checked() -> None:
    rows = [row(0, 1.0, [], correct=True), row(1, 1.0, [], correct=False), row(2, 1.0, [])]
    assert summarize(rows, 1.0).correct_fraction == 0.5
    assert summarize(rows[2:], 1.0).correct_fraction is None


@pytest.mark.parametrize(
    "slo", ["", "ttft", "ttft=", "ttft=a", "ttft=0", "ttft=-1", "ttft=inf", "p99=3", "itl=1,itl=2"]
)
def test_a_wrong_objective_is_refused(slo: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Objective.parse(slo)
