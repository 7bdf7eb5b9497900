"""The real engine over simulated workers in simulated time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from benchmarks import router, router_quality
from benchmarks.simulation.policies import POLICIES
from benchmarks.simulation.service import Plan, simulate
from benchmarks.simulation.trace import MEAN_OUTPUT, MEAN_PROMPT, Arrival, make_trace
from benchmarks.simulation.virtual_time import run_simulated
from benchmarks.simulation.workers import Hardware
from cluster.routing.router import place
from workers.runner.step_times import StepTimes

CAPABILITY = StepTimes(prefill=((10, 0.1), (10_000, 100.0)), decode=((1, 0.01), (100, 0.01)))
HARDWARE = Hardware(CAPABILITY, load_s=1.0, link_bytes_per_s=131_072e3, steps_at_once=1)


def test_hours_pass_at_once_and_in_order():
    seen = []

    async def sleeper(seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((seconds, asyncio.get_running_loop().time()))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7200):
                await asyncio.Event().wait()
        await asyncio.gather(*(sleeper(s) for s in (3600.0, 1.5, 86_400.0 * 3)))

    run_simulated(main())
    assert seen == [(s, pytest.approx(7200 + s)) for s in (1.5, 3600.0, 86_400.0 * 3)]


def test_a_standstill_is_an_error_and_no_hang():
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing is due"):
        run_simulated(main())


def test_one_request_takes_what_its_workers_take():
    outcome = simulate(Plan([HARDWARE], [HARDWARE]), [Arrival(5.0, 100, 11)], place)
    assert outcome.ttft_s == [pytest.approx(1.0)]
    assert outcome.itl_s == [pytest.approx(0.01 + 0.1 / 32 / 10)], "ten steps, and the last layer's handoff before them"
    slow = replace(HARDWARE, link_bytes_per_s=50 * 131_072.0)
    outcome = simulate(Plan([slow], [HARDWARE]), [Arrival(5.0, 100, 11)], place)
    assert outcome.itl_s == [pytest.approx(0.01 + (2.0 - 1.0) / 10)], "computing hides a second of two"


def test_prompts_wait_for_each_other():
    outcome = simulate(Plan([HARDWARE], [HARDWARE]), [Arrival(0.0, 100, 2)] * 3, place)
    assert sorted(outcome.ttft_s) == pytest.approx([1.0, 2.0, 3.0])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everything(policy):
    trace = make_trace(150, 2.0, 1, prompt_scale=0.01, output_scale=0.1)
    outcome = simulate(Plan([HARDWARE] * 2, [HARDWARE] * 2), trace, POLICIES[policy]())
    assert (len(outcome.ttft_s), outcome.failures) == (150, {})


def test_the_same_seed_gives_the_same_outcome():
    plan = Plan([HARDWARE] * 2, [HARDWARE] * 2, kill_every_s=20.0)
    one, other = (simulate(plan, make_trace(100, 2.0, 1, prompt_scale=0.01, output_scale=0.1), place) for _ in range(2))
    assert (one.ttft_s, one.itl_s, one.killed) == (other.ttft_s, other.itl_s, other.killed)


def test_no_request_is_lost_when_workers_are_killed():
    """Each one succeeds, or ends in an error: its workers were killed again and again, which may be its own doing."""
    plan = Plan([HARDWARE] * 3, [HARDWARE] * 3, kill_every_s=5.0)
    outcome = simulate(plan, make_trace(300, 3.0, 2, prompt_scale=0.01, output_scale=0.1), place)
    assert outcome.killed >= 10
    assert len(outcome.ttft_s) + sum(outcome.failures.values()) == 300
    assert set(outcome.failures) <= {"WorkerLostError", "CrashingRequestError"}
    assert len(outcome.ttft_s) > 250


def test_predicted_time_beats_turns_on_uneven_workers():
    slower = (tuple((n, 4 * seconds) for n, seconds in points) for points in (CAPABILITY.prefill, CAPABILITY.decode))
    slow = replace(HARDWARE, step_times=StepTimes(*slower))
    trace = make_trace(200, 1.2, 3, prompt_scale=0.01, output_scale=0.1)
    pool = [HARDWARE, slow]
    mean = {name: sum(simulate(Plan(pool, pool), trace, make()).ttft_s) for name, make in POLICIES.items()}
    assert mean["predicted time"] < 0.8 * mean["round robin"]


def test_the_trace_has_the_lengths_that_it_says():
    trace = make_trace(20_000, 10.0, 0)
    assert sum(a.prompt_tokens for a in trace) / 20_000 == pytest.approx(MEAN_PROMPT, rel=0.1)
    assert sum(a.output_tokens for a in trace) / 20_000 == pytest.approx(MEAN_OUTPUT, rel=0.1)
    assert trace[-1].at_s == pytest.approx(2000, rel=0.05)
    assert trace == make_trace(20_000, 10.0, 0)


def test_the_benchmarks_write_their_results(tmp_path):
    assert router.main(["--workers", "3", "--requests", "200", "--output", str(tmp_path / "a.json")]) == 0
    cases = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert [(case["workers"], case["knows"]) for case in cases] == [(3, case.name) for case in router.CASES]
    assert all(case["decision_us"] > 0 for case in cases)
    assert router_quality.main(["--requests", "60", "--loads", "0.5", "--output", str(tmp_path / "b.json")]) == 0
    cases = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert [(case["policy"], case["disaggregation"]) for case in cases] == [
        ("predicted time", "always"),
        ("predicted time", "auto"),
        ("predicted time", "never"),
        ("least loaded", "always"),
        ("round robin", "always"),
    ]
    assert all(case["succeeded"] == 60 for case in cases)
