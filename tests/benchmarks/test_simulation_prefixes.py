"""Simulated workers keep prefixes, and decode workers compute prompts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.simulation.content import ContentPrefix, content_hashes, prompt_of
from benchmarks.simulation.prefix_store import PrefixStore
from benchmarks.simulation.service import Outcome, Plan, simulate
from benchmarks.simulation.trace import Arrival, make_trace
from benchmarks.simulation.workers import Hardware
from cluster.routing.router import place
from workers.runner.step_times import StepTimes
from workers.token_ids import as_token_ids

CAPABILITY = StepTimes(((10, 0.1), (10_000, 100.0)), ((1, 0.01), (100, 0.01)))
"""10 ms a prompt token, and a step."""
HARDWARE = Hardware(CAPABILITY, block_size=10, num_blocks=1000, load_s=1.0, chunk_tokens=50, steps_at_once=1)


def run(trace: list[Arrival], disaggregation: str = "always", prefill: int = 1, decode: int = 1, **changes) -> Outcome:
    hardware = replace(HARDWARE, **changes)
    plan = Plan([hardware] * prefill, [hardware] * decode, disaggregation=disaggregation)
    outcome = simulate(plan, trace, place)
    assert outcome.succeeded == len(trace), outcome.failures
    return outcome


def test_prompts_of_a_family_are_alike_as_far_as_they_say():
    one, other, alone = prompt_of(100, 1, 55, 7), prompt_of(200, 1, 95, 8), prompt_of(100, 2, 55, 9)
    hashes = [content_hashes(prompt, 10) for prompt in (one, other, alone)]
    assert [len(each) for each in hashes] == [10, 20, 10]
    assert hashes[0][:5] == hashes[1][:5]
    assert len(set(hashes[0]) & set(hashes[1])) == 5
    assert not set(hashes[2]) & {*hashes[0], *hashes[1]}
    assert content_hashes(prompt_of(100), 10) == ()
    assert ContentPrefix(one).hashes(10) == hashes[0][:9], "the block with the last token is always computed"
    assert ContentPrefix(one).followed_by(as_token_ids((0,) * 15)).hashes(10)[:10] == hashes[0]


def test_the_store_forgets_what_was_not_used_and_says_so():
    rng, store, heard = random.Random(0), PrefixStore(40, 10), set()
    for number in range(300):
        prompt = prompt_of(rng.randint(10, 150), rng.randint(1, 4), rng.randint(0, 150), number)
        hashes = content_hashes(prompt, 10)[: (len(prompt) - 1) // 10]
        depth = next((i for i, content in enumerate(hashes) if content not in heard), len(hashes))
        assert store.find(prompt) == 10 * depth, "what was told is what is there"
        store.keep(prompt)
        if update := store.take_update():
            assert not set(update.stored) & heard
            assert set(update.removed) <= heard
            heard = (heard | set(update.stored)) - set(update.removed)
        assert len(heard) <= 40
        assert set(hashes) <= heard
    assert store.take_update() is None


def test_what_is_cached_is_not_computed_again():
    outcome = run([Arrival(0.0, 100, 2, 0, 1, 80), Arrival(10.0, 100, 2, 0, 1, 80), Arrival(20.0, 100, 2, 0, 2, 80)])
    assert outcome.ttft_s == pytest.approx([1.0, 0.2, 1.0])


def test_what_the_decode_worker_has_is_not_moved():
    slow = 10 * 131_072.0  # ten tokens a second
    trace = [Arrival(0.0, 100, 2, 0, 1, 80), Arrival(100.0, 100, 2, 0, 1, 80)]
    outcome = run(trace, link_bytes_per_s=slow)
    assert outcome.itl_s == pytest.approx([0.01 + 10.0 - 1.0, 0.01 + 2.0 - 0.2])


def test_a_decode_worker_computes_prompts_in_chunks_beside_its_steps():
    alone = run([Arrival(0.0, 100, 11)], "never", prefill=0)
    assert alone.ttft_s == pytest.approx([1.0])
    assert alone.itl_s == pytest.approx([0.01])
    both = run([Arrival(0.0, 100, 31), Arrival(1.1, 100, 11)], "never", prefill=0)
    assert sorted(both.ttft_s) == pytest.approx([1.0, 1.02], abs=0.02), "two chunks, and a step with each"
    assert max(both.itl_s) == pytest.approx(0.01 + 1.0 / 30, abs=1e-3), "who decodes waits for both"


def test_auto_uses_idle_decode_workers_and_spares_busy_ones():
    trace = make_trace(120, 0.55, 5, prompt_scale=0.02, output_scale=0.2)
    always, auto, never = (run(trace, mode, decode=2) for mode in ("always", "auto", "never"))
    assert sum(auto.ttft_s) < 0.8 * sum(always.ttft_s)
    assert sum(auto.itl_s) < 0.8 * sum(never.itl_s)
