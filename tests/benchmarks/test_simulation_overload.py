"""Simulated workers' memory, and the service past saturation and at scale."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import saturation, simulation_scale
from benchmarks.simulation.decode_memory import DecodeMemory, Sequence
from benchmarks.simulation.service import Plan, simulate
from benchmarks.simulation.trace import Arrival, make_trace
from benchmarks.simulation.workers import Hardware
from cluster.routing.router import place
from made_requests import worker_request
from workers.runner.step_times import StepTimes
from workers.sampling_params import SamplingParams

CAPABILITY = StepTimes(prefill=((10, 0.1), (10_000, 100.0)), decode=((1, 0.01), (100, 0.01)))
HARDWARE = Hardware(CAPABILITY, load_s=1.0, link_bytes_per_s=131_072e3, steps_at_once=1)


def sequence(name: str, num_tokens: int, remaining: int = 100) -> Sequence:
    request = worker_request(name, (0,) * (num_tokens - 1), SamplingParams(max_tokens=remaining), "p")
    return Sequence(request, num_tokens, remaining, handed_over=True)


def step(memory: DecodeMemory, steps_at_once: int = 1) -> tuple[str, int]:
    """Who ran, and how many blocks moved."""
    batch, steps, moved = memory.next_batch(steps_at_once)
    for each in batch:
        each.num_tokens += steps
        each.remaining -= steps
    return "".join(each.request.request_id for each in batch), moved


def test_the_newest_make_room_and_come_back_before_anybody_new():
    memory = DecodeMemory(num_blocks=4, block_size=4)
    for name in "abc":
        memory.enter(sequence(name, 6))
    assert memory.num_free == 0, "a and b hold two blocks each; c waits"
    assert step(memory, 2) == ("ab", 0)
    assert step(memory) == ("a", 2), "a needs a third block, b makes room"
    assert (memory.num_preempted, memory.num_free) == (1, 1)
    assert step(memory) == ("a", 0), "c would not fit, and may not pass b"
    memory.leave("a")
    assert step(memory) == ("b", 3)
    assert memory.num_free == 1
    memory.leave("b")
    assert step(memory) == ("c", 0)
    memory.leave("c")
    assert (memory.num_free, len(memory)) == (4, 0)


def test_growing_beyond_the_cache_costs_time_and_loses_nothing():
    """Two requests of 4 + 200 tokens in a cache that holds one and a half of them."""
    small = replace(HARDWARE, num_blocks=5, host_bytes_per_s=64 * 131_072.0)
    trace = [Arrival(0.0, 4, 200)] * 2
    roomy, cramped = (simulate(Plan([HARDWARE], [decode], seed=1), trace, _first) for decode in (HARDWARE, small))
    assert (roomy.preempted, roomy.succeeded) == (0, 2)
    assert (cramped.preempted, cramped.succeeded) == (1, 2)
    assert cramped.seconds > roomy.seconds + 1


def _first(routing_request, prefill, decode, links):
    return place(replace(routing_request, outlook=None), prefill, decode, links)


def test_room_for_growth_avoids_preemption():
    pool = [replace(HARDWARE, num_blocks=160, steps_at_once=8)]
    trace = make_trace(400, 28.0, 4, prompt_scale=0.005, output_scale=1.0)
    heedless, careful = (simulate(Plan([HARDWARE] * 12, pool), trace, choose) for choose in (_first, place))
    assert heedless.succeeded == careful.succeeded == 400
    assert heedless.preempted > 20
    assert careful.preempted < heedless.preempted / 5
    assert careful.seconds < 1.5 * heedless.seconds, "the cache is used all the same"


@pytest.mark.parametrize("load", [1.0, 2.0])
def test_past_saturation_those_who_are_served_are_served_in_time(load):
    plan = Plan([HARDWARE] * 4, [HARDWARE] * 4, max_queue_wait_s=8.0)
    trace = [Arrival(i / (4.0 * load), 100, 10) for i in range(400)]  # a prompt takes a second
    outcome = simulate(plan, trace, place)
    assert outcome.succeeded + outcome.failures["QueueFullError"] == 400
    assert outcome.succeeded >= 400 * 0.9 / load
    assert max(outcome.ttft_s) < 8.0 + 1.0 + 0.5


def test_saturation_writes_its_result(tmp_path):
    file = tmp_path / "s.json"
    assert saturation.main(["--requests", "60", "--loads", "0.5", "1.5", "--output", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 2 * 2 * 2
    assert all(case["succeeded"] + sum(case["failures"].values()) == case["requests"] for case in cases)


def test_scale_loses_nothing(tmp_path):
    file = tmp_path / "s.json"
    assert simulation_scale.main(["--workers", "40", "--requests", "1500", "--output", str(file)]) == 0
    result = json.loads(file.read_text())["result"]
    assert result["lost"] == 0
    assert result["succeeded"] > 1200
    assert result["killed"] >= 5
    assert result["scaled"] >= 1
    assert set(result["peak_rss_mib"]) == {"10%", "50%", "100%"}
