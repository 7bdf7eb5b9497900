"""The planner: splits, cases by hand, and what the simulated service does at the rates that it names."""

import math
import random

import pytest

from benchmarks.simulation.service import Outcome, Plan, simulate
from benchmarks.simulation.trace import Arrival
from benchmarks.simulation.workers import Hardware
from cluster.planning.measured import step_seconds
from cluster.planning.plans import outlook, plan_split, recommend, splits_of
from cluster.planning.terms import DecodeWorker, Fleet, Lengths, Objective, PrefillWorker, Split, Workload
from cluster.routing.router import place
from workers.errors import InvalidRequestError
from workers.runner.step_times import StepTimes

pytestmark = pytest.mark.slow

CAPABILITY = StepTimes(prefill=((100, 0.01), (10_000, 1.0)), decode=((1, 0.01), (101, 0.02)))
"""A tenth of a millisecond for each prompt token; a step takes 10 ms and 0.1 ms for each further sequence."""
FLEET = Fleet(PrefillWorker(CAPABILITY.prefill_seconds), DecodeWorker(step_seconds(CAPABILITY), 64, 10**9))
LONG_PROMPTS = Workload(Lengths((1000,)), Lengths((11,)))
LONG_ANSWERS = Workload(Lengths((50,)), Lengths((101,)))
OBJECTIVE = Objective(ttft_s=0.5, itl_s=0.0145)


def test_every_split_uses_all_gpus() -> None:
    assert list(map(str, splits_of(4))) == ["1P3D", "2P2D", "3P1D"]
    assert list(map(str, splits_of(8, prefill_gpus=2, decode_gpus=4))) == ["1P1D", "2P1D"]
    for arguments in ((1,), (4, 3, 2), (4, 0, 1)):
        with pytest.raises(InvalidRequestError, match="GPUs"):
            splits_of(*arguments)


def test_saturation_by_hand() -> None:
    """Ten prompts a second on a worker; a full batch of 64 steps in 16.3 ms, each request 100 times."""
    prompts = plan_split(FLEET, Split(2, 1), LONG_PROMPTS, OBJECTIVE)
    assert prompts.saturates == "prefill"
    assert prompts.saturated_per_s == pytest.approx(2 * 10.0)
    answers = plan_split(FLEET, Split(1, 2), LONG_ANSWERS, OBJECTIVE)
    assert answers.saturates == "decode"
    assert answers.saturated_per_s == pytest.approx(2 * 64 / (100 * 0.0163))


def test_the_batch_by_littles_law() -> None:
    """20 a second, 100 steps: n = 2000 * (0.0099 + 0.0001 n), so 24.75 in steps of 12.375 ms."""
    at = outlook(FLEET, Split(1, 1), LONG_ANSWERS, OBJECTIVE, 20.0)
    assert at.decode.batch == pytest.approx(24.75)
    assert at.decode.itl_s == pytest.approx(0.012375)


def test_the_cache_bounds_the_batch() -> None:
    small = Fleet(FLEET.prefill, DecodeWorker(step_seconds(CAPABILITY), 64, 1510))
    plan = plan_split(small, Split(1, 1), LONG_ANSWERS, OBJECTIVE)
    places = 1510 / 151
    assert plan.saturated_per_s == pytest.approx(places / (100 * (0.0099 + 0.0001 * places)))


def test_the_pool_that_bounds_the_goodput_gets_the_gpus() -> None:
    for workload, best, pool in ((LONG_PROMPTS, "3P1D", "prefill"), (LONG_ANSWERS, "1P3D", "decode")):
        plans = [plan_split(FLEET, split, workload, OBJECTIVE) for split in splits_of(4)]
        assert str(recommend(plans).split) == best
        assert {plan.bound_by for plan in plans} == {pool}
        assert all(plan.at.met == pytest.approx(0.9, abs=0.001) for plan in plans)
        assert all(0 < plan.goodput_per_s < plan.saturated_per_s for plan in plans)


def test_what_no_rate_can_meet() -> None:
    late_prompts = plan_split(FLEET, Split(1, 1), LONG_PROMPTS, Objective(0.05, 1.0))
    late_tokens = plan_split(FLEET, Split(1, 1), LONG_ANSWERS, Objective(1.0, 0.005))
    assert (late_prompts.goodput_per_s, late_prompts.bound_by) == (0.0, "prefill")
    assert (late_tokens.goodput_per_s, late_tokens.bound_by) == (0.0, "decode")


def test_past_saturation_nothing_is_met() -> None:
    at = outlook(FLEET, Split(1, 1), LONG_PROMPTS, OBJECTIVE, 10.5)
    assert (at.prefill.met, at.prefill.ttft_s, at.met) == (0.0, math.inf, 0.0)


def test_prompts_that_share_a_step_cost_less_and_take_longer() -> None:
    seconds = StepTimes(prefill=((100, 0.02), (1000, 0.03))).prefill_seconds
    alone, shared = PrefillWorker(seconds), PrefillWorker(seconds, 1000)
    workload = Workload(Lengths((100,)), Lengths((1,)))
    objective = Objective(0.2, 1.0)
    one, ten = (plan_split(Fleet(w, FLEET.decode), Split(1, 1), workload, objective) for w in (alone, shared))
    assert one.saturated_per_s == pytest.approx(50.0)
    assert ten.saturated_per_s == pytest.approx(10 / 0.03)
    two = plan_split(Fleet(PrefillWorker(seconds, 1000, 2), FLEET.decode), Split(1, 1), workload, objective)
    assert two.saturated_per_s == pytest.approx(2 / seconds(200))
    assert ten.goodput_per_s > 3 * one.goodput_per_s
    at = outlook(Fleet(shared, FLEET.decode), Split(1, 1), workload, objective, 200.0)
    assert 0.02 < at.prefill.ttft_mean_s < 0.06
    assert 1 < at.prefill.at_once < 10


def test_two_workers_that_do_both_decode_more_and_prefill_in_each_others_way() -> None:
    decode_bound = [plan_split(FLEET, split, LONG_ANSWERS, OBJECTIVE) for split in (Split(1, 1), Split(0, 2))]
    assert str(recommend(decode_bound).split) == "2 mixed"
    prompts = [plan_split(FLEET, split, LONG_PROMPTS, OBJECTIVE) for split in (Split(1, 1), Split(0, 2))]
    assert str(recommend(prompts).split) == "1P1D", "steps between prompts come too late"


def test_a_step_past_the_largest_batch_that_was_measured() -> None:
    seconds = step_seconds(StepTimes(decode=((1, 0.004), (16, 0.005), (64, 0.008)), kv_token_s=1e-8))
    assert seconds(40.0, 0.0) == pytest.approx(0.0065)
    assert seconds(128.0, 1e5) == pytest.approx(0.008 + 64 * 0.003 / 48 + 0.001)
    assert step_seconds(StepTimes(decode=((1, 0.004),)))(5.0, 0.0) > 0.0


@pytest.mark.parametrize("values", [(), (0,), (5, -1)])
def test_lengths_are_whole_and_positive(values: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1"):
        Lengths(values)


HARDWARE = Hardware(CAPABILITY, max_num_seqs=64, load_s=0.1, link_bytes_per_s=1e15, steps_at_once=1, num_blocks=10**6)


@pytest.mark.parametrize(("split", "workload"), [(Split(2, 1), LONG_PROMPTS), (Split(1, 2), LONG_ANSWERS)])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_simulated_service_does_what_was_predicted(split: Split, workload: Workload, load: float) -> None:
    """The real engine and router over simulated workers: TTFT within 15 %, time between tokens within 5 %."""
    rate = load * plan_split(FLEET, split, workload, OBJECTIVE).saturated_per_s
    at, outcome = outlook(FLEET, split, workload, OBJECTIVE, rate), _simulate(split, workload, rate)
    ttft, itl = (sum(values) / len(values) for values in (outcome.ttft_s, outcome.itl_s))
    assert at.prefill.ttft_mean_s == pytest.approx(ttft, rel=0.15)
    assert at.decode.itl_s == pytest.approx(itl, rel=0.05)


@pytest.mark.parametrize(("split", "workload"), [(Split(2, 1), LONG_PROMPTS), (Split(1, 2), LONG_ANSWERS)])
def test_the_simulated_service_meets_objectives_up_to_the_predicted_goodput(split: Split, workload: Workload) -> None:
    good = plan_split(FLEET, split, workload, OBJECTIVE).goodput_per_s
    below, above = (_share(_simulate(split, workload, factor * good)) for factor in (0.9, 1.15))
    assert below >= OBJECTIVE.share > above


def _share(outcome: Outcome) -> float:
    return outcome.good(OBJECTIVE.ttft_s, OBJECTIVE.itl_s) / outcome.succeeded


def _simulate(split: Split, workload: Workload, rate: float) -> Outcome:
    """Those that come first find an empty service, so that there must be many."""
    rng, at, trace = random.Random(0), 0.0, []
    for _ in range(250_000 // (100 + workload.output.values[0])):
        at += rng.expovariate(rate)
        trace.append(Arrival(at, workload.prompt.values[0], workload.output.values[0]))
    return simulate(Plan([HARDWARE] * split.prefill, [HARDWARE] * split.decode), trace, place)
