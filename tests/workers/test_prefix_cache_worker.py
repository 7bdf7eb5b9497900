"""Prompts that begin alike share blocks, and nobody sees a difference: tokens and cache are those without sharing."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cached_blocks import check_cached_blocks, poison_free_blocks
from fuzzing import fuzzed
from kv_transfer.transports.local import Faults
from local_cluster import LocalCluster
from made_requests import worker_request
from workers.block_hashes import block_hashes
from workers.kv_cache.block_pool import blocks_for
from workers.messages import PrefillReport, RequestFailed, WorkerRequest
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def steps_ahead() -> int:
    """Of decode: it has tests of its own."""
    return 0


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def alone(request_id: str, token_ids: list[int]) -> WorkerRequest:
    return worker_request(request_id, token_ids, GREEDY)


def report(prefill, token_ids: list[int]) -> PrefillReport:
    """Compute a prompt on an idle worker."""
    prefill.add(alone("r", token_ids))
    events = []
    while prefill.has_requests:
        events += prefill.step()
    return next(event for event in events if isinstance(event, PrefillReport))


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        (prompt(40), prompt(40), 32),
        (prompt(40), prompt(32), 16),  # its last token is computed again, and with it the last block
        (prompt(40), prompt(33), 32),
        (prompt(40), prompt(100), 32),
        (prompt(15), prompt(15), 0),
        (prompt(40), prompt(20) + prompt(20, seed=1), 16),
        (prompt(40), prompt(40, seed=1), 0),
    ],
)
def test_what_is_cached_is_not_computed_again(first, second, cached, one_pair, reference_greedy, tiny_checkpoint):
    cluster, prefill, _ = one_pair()
    assert report(prefill, first).cached_tokens == 0
    rows = []
    forward = prefill.runner.forward
    prefill.runner.forward = lambda batch, on_layer=None: rows.extend(batch) or forward(batch, on_layer)
    cluster.submit("second", second, GREEDY)
    assert cluster.run() == {"second": reference_greedy(tiny_checkpoint("llama"), second, 6)}
    ((start, length),) = [(row.start, len(row.token_ids)) for row in rows]
    assert (start, length) == (cached, len(second) - cached)
    count = blocks_for(len(second), 16)
    assert cluster.reports["second"].num_bytes == 3 * count * prefill.runner.kv_caches[0][0, 0].nbytes, "all go over"
    assert cluster.reports["second"].num_parts == 3 + bool(cached), "what is cached goes at once, in all layers"
    cluster.assert_all_blocks_free()


def test_blocks_are_their_requests_owners_on_both_workers(one_pair):
    cluster, prefill, decode = one_pair()
    for owner in ("ann", "bob"):
        cluster.submit(owner, prompt(40, seed=len(owner) + ord(owner[0])), GREEDY, cache_owner=owner)
    cluster.run()
    for worker in (prefill, decode):
        held = worker.cache.primary_pool.held_by_owners
        assert set(held) == {"ann", "bob"}
        assert all(count >= 2 for count in held.values())


def test_reports_say_how_much_was_cached(one_pair):
    _, prefill, _ = one_pair()
    assert [report(prefill, prompt(n)).cached_tokens for n in (40, 100, 100)] == [0, 32, 96]


def test_it_can_be_switched_off(one_pair):
    _, prefill, _ = one_pair(enable_prefix_caching=False)
    assert [report(prefill, prompt(40)).cached_tokens for _ in range(2)] == [0, 0]
    assert prefill.take_cache_update() is None


def test_a_cached_prompt_needs_no_room_for_what_it_shares(one_pair):
    """While the blocks of one are still read, another that begins alike runs beside it."""
    cluster, prefill, _ = one_pair(prefill_blocks=6, faults=Faults(seed=1, max_delay=50))
    cluster.submit("a", prompt(80), GREEDY)
    prefill.step()
    assert prefill.load.reserved_blocks == 5
    cluster.submit("b", prompt(90), GREEDY)
    (said, _) = prefill.step()
    assert said.cached_tokens == 80
    assert prefill.load.reserved_blocks == 6
    cluster.run()
    cluster.assert_all_blocks_free()


def test_a_step_in_flight_gives_nothing_to_share(one_pair):
    _, prefill, _ = one_pair(prefill_steps_ahead=1, max_num_batched_tokens=40)
    for name in ("a", "b", "c"):
        prefill.add(alone(name, prompt(40)))
    said = [event for _ in range(4) for event in prefill.step() if isinstance(event, PrefillReport)]
    assert [event.cached_tokens for event in said] == [0, 0, 32], "b was launched before a had landed"


def test_a_prompt_that_was_aborted_leaves_what_it_had_computed(one_pair, reference_greedy, tiny_checkpoint):
    cluster, prefill, _ = one_pair(max_num_batched_tokens=24)
    cluster.submit("a", prompt(90), GREEDY)
    prefill.step()
    cluster.abort("a")
    cluster.run()
    cluster.assert_all_blocks_free()
    poison_free_blocks(cluster.prefill.values())
    cluster.submit("b", prompt(90), GREEDY)
    assert cluster.run()["b"] == reference_greedy(tiny_checkpoint("llama"), prompt(90), 6)
    assert check_cached_blocks(cluster, cluster.prefill.values(), [prompt(90)]) == 5


def test_broken_logits_take_their_blocks_with_them(one_pair, monkeypatch, reference_greedy, tiny_checkpoint):
    """Also those that were found in the cache: else whatever is wrong there fails every prompt that begins so."""
    cluster, prefill, _ = one_pair()
    report(prefill, prompt(64))
    (block, *_) = prefill.blocks.find(block_hashes(prompt(64), 16))
    prefill.runner.kv_caches[0][:, block] = torch.nan
    prefill.add(alone("broken", prompt(70)))
    assert [type(event) for event in prefill.step()] == [RequestFailed]
    assert report(prefill, prompt(70)).cached_tokens == 0
    cluster.submit("again", prompt(70), GREEDY)
    assert cluster.run() == {"again": reference_greedy(tiny_checkpoint("llama"), prompt(70), 6)}


def test_updates_follow_the_cache(one_pair):
    _, prefill, _ = one_pair(prefill_blocks=5)
    report(prefill, prompt(64))
    assert prefill.take_cache_update().stored == block_hashes(prompt(64), 16)
    report(prefill, prompt(40, seed=1))
    update = prefill.take_cache_update()
    assert update.stored == block_hashes(prompt(32, seed=1), 16)
    assert set(update.removed) == set(block_hashes(prompt(64), 16)[2:]), "the end of the other prompt made room"
    assert prefill.take_cache_update() is None


@cache
def expected(checkpoint, token_ids: tuple[int, ...]) -> list[int]:
    cluster = LocalCluster(checkpoint, enable_prefix_caching=False)
    cluster.submit("r", list(token_ids), GREEDY)
    return cluster.run()["r"]


@st.composite
def families(draw) -> list[list[int]]:
    """Prompts of which many begin alike: each follows another one for a while and then goes its own way."""
    prompts = [prompt(draw(st.integers(1, 70)), seed=0)]
    for seed in range(1, draw(st.integers(4, 14))):
        parent = draw(st.sampled_from(prompts))
        kept = draw(st.integers(0, len(parent)))
        own = prompt(draw(st.integers(0, 40)), seed=draw(st.integers(1, 3)) if kept else seed)
        prompts.append((parent[:kept] + own)[:100] or [5])
    return prompts


@given(
    prompts=families(),
    block_size=st.sampled_from([8, 16]),
    spare_blocks=st.integers(0, 12),
    budget=st.sampled_from([7, 16, 33, 256]),
    ahead=st.integers(0, 1),
    delay=st.sampled_from([0, 4, 20]),
    rng=st.randoms(use_true_random=False),
)
@fuzzed(12)
def test_tokens_and_cache_are_those_without_a_cache(
    prompts, block_size, spare_blocks, budget, ahead, delay, rng, tiny_checkpoint
):
    checkpoint = tiny_checkpoint("llama")
    cluster = LocalCluster(
        checkpoint,
        block_size=block_size,
        prefill_blocks=blocks_for(max(map(len, prompts)), block_size) + spare_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        layers_per_write=rng.choice([1, 2, 3]),
        prefill_steps_ahead=ahead,
        faults=Faults(seed=rng.randrange(1000), max_delay=delay) if delay else None,
    )
    waiting, aborted = list(enumerate(prompts)), set()
    while waiting or cluster.busy:
        if waiting and rng.random() < 0.5:
            number, token_ids = waiting.pop(0)
            cluster.submit(f"r{number}", token_ids, GREEDY)
        if rng.random() < 0.05:
            aborted.add(victim := f"r{rng.randrange(len(prompts))}")
            cluster.abort(victim)
        cluster.step()
        poison_free_blocks(cluster.prefill.values())
    for number, token_ids in enumerate(prompts):
        if f"r{number}" not in aborted:
            assert cluster.token_ids(f"r{number}") == expected(checkpoint, tuple(token_ids)), number
    assert not cluster.failures
    cluster.assert_all_blocks_free()
    check_cached_blocks(cluster, cluster.prefill.values(), prompts)
