"""Which pair serves a request."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router import Candidate, NoPlacement, Placement, place
from workers.capability import Capability

FAST = Capability(prefill=((100, 0.1),), decode=((1, 0.01), (10, 0.02)))
SLOW = Capability(prefill=((100, 1.0),), decode=((1, 0.1), (10, 0.2)))


def worker(engine_id: str, **changes) -> Candidate:
    return dataclasses.replace(Candidate(engine_id, True, 1000, 16, 64, 64, 8, capability=FAST), **changes)


def chosen(placement) -> tuple[str, str]:
    assert isinstance(placement, Placement), placement
    return placement.prefill, placement.decode


def refused(placement) -> NoPlacement:
    assert isinstance(placement, NoPlacement), placement
    return placement


def test_the_faster_pair_is_chosen():
    prefill = [worker("p-slow", capability=SLOW), worker("p-fast")]
    decode = [worker("d-slow", capability=SLOW), worker("d-fast")]
    placement = place(100, 64, prefill, decode)
    assert chosen(placement) == ("p-fast", "d-fast")
    assert placement.cost_s == pytest.approx(0.1 + 64 * 0.01)
    assert len(placement.explanation) == 4


def test_queued_prompts_count():
    busy = worker("p-0", queued_tokens=2000)
    assert chosen(place(100, 64, [busy, worker("p-1", capability=SLOW)], [worker("d")])) == ("p-1", "d")


def test_the_batch_counts():
    assert chosen(place(100, 64, [worker("p")], [worker("d-0", running=7), worker("d-1", running=1)])) == ("p", "d-1")


def test_unmeasured_workers_share_the_load():
    unknown = [worker("d-0", running=3, capability=Capability()), worker("d-1", running=2, capability=Capability())]
    assert chosen(place(100, 64, [worker("p", capability=Capability())], unknown)) == ("p", "d-1")


def test_only_pairs_that_can_work_together_are_used():
    prefill = [worker("p-16"), worker("p-32", block_size=32, capability=SLOW)]
    decode = [worker("d-32", block_size=32, refusals={"p-16": "block_size is 32 here and 16 there"})]
    placement = place(100, 64, prefill, decode)
    assert chosen(placement) == ("p-32", "d-32")
    assert "p-16 -> d-32: block_size is 32 here and 16 there" in placement.explanation
    backwards = [worker("p-16", refusals={"d-32": "no"}), prefill[1]]
    assert chosen(place(100, 64, backwards, [worker("d-32", block_size=32)])) == ("p-32", "d-32")


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"max_model_len": 100}, {}, "p: 100 prompt tokens, context window 100"),
        ({}, {"max_model_len": 100}, "d: 100 prompt tokens, context window 100"),
        ({}, {"total_blocks": 6, "free_blocks": 6}, "d: 7 blocks needed, 6 in all"),
        ({"total_blocks": 6}, {}, "p: 7 blocks needed, 6 in all"),
        ({"refusals": {"d": "unlike layouts"}}, {}, "p -> d: unlike layouts"),
    ],
)
def test_what_waiting_does_not_help_is_hopeless(prefill, decode, reason):
    outcome = refused(place(100, 64, [worker("p", **prefill)], [worker("d", **decode)]))
    assert outcome.hopeless
    assert outcome.reasons == (reason,)


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"ready": False}, {}, "p: not ready"),
        ({}, {"ready": False}, "d: not ready"),
        ({}, {"free_slots": 0}, "d: its batch is full"),
        ({}, {"free_blocks": 6}, "d: 7 blocks needed, 6 free"),
        ({"estranged": {"d": "no answer"}}, {}, "p -> d: no answer"),
        ({}, {"estranged": {"p": "no answer"}}, "p -> d: no answer"),
    ],
)
def test_what_waiting_helps_is_not_hopeless(prefill, decode, reason):
    outcome = refused(place(100, 64, [worker("p", **prefill)], [worker("d", **decode)]))
    assert not outcome.hopeless
    assert outcome.reasons == (reason,)


def test_one_hope_is_enough():
    decode = [worker("d-small", total_blocks=4), worker("d-full", free_blocks=0)]
    outcome = refused(place(100, 64, [worker("p")], decode))
    assert not outcome.hopeless
    assert len(outcome.reasons) == 2


@pytest.mark.parametrize("pools", [([], []), ([worker("p")], []), ([], [worker("d")])])
def test_an_empty_pool_may_yet_fill(pools):
    outcome = refused(place(100, 64, *pools))
    assert not outcome.hopeless
    assert outcome.reasons == ("there are no workers",)


def test_a_busy_prefill_worker_still_takes_prompts():
    assert chosen(place(100, 64, [worker("p", free_blocks=0, free_slots=0)], [worker("d")])) == ("p", "d")


candidates = st.builds(
    Candidate,
    engine_id=st.sampled_from("abcdef"),
    ready=st.booleans(),
    max_model_len=st.sampled_from([50, 200]),
    block_size=st.sampled_from([16, 32]),
    total_blocks=st.integers(1, 20),
    free_blocks=st.integers(-3, 20),
    free_slots=st.integers(-1, 3),
    running=st.integers(0, 9),
    queued_tokens=st.integers(0, 500),
    capability=st.sampled_from([FAST, SLOW, Capability()]),
)


@given(
    st.integers(1, 120),
    st.integers(1, 100),
    st.lists(candidates, max_size=3, unique_by=lambda c: c.engine_id),
    st.lists(candidates, max_size=3, unique_by=lambda c: c.engine_id),
)
def test_a_placement_is_always_one_that_fits(prompt_tokens, max_tokens, prefill, decode):
    placement = place(prompt_tokens, max_tokens, prefill, decode)
    fitting = [
        d
        for p in prefill
        for d in decode
        if p.ready and d.ready and d.free_slots > 0
        if min(p.max_model_len, d.max_model_len) > prompt_tokens
        if p.total_blocks * p.block_size > prompt_tokens
        if min(d.total_blocks, d.free_blocks) * d.block_size > prompt_tokens
    ]
    if isinstance(placement, Placement):
        assert placement.decode in {d.engine_id for d in fitting}
        assert placement.cost_s >= 0
    else:
        assert not fitting
        assert placement.reasons
