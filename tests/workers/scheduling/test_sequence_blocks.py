"""What decode holds of a prompt is not handed over again, and nobody sees a difference but in the bytes."""

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
from lockstep_cluster import LockstepCluster
from workers.block_hashes import block_hashes
from workers.decode_worker import DecodeWorker
from workers.errors import SamplingError
from workers.kv_cache.block_pool import blocks_for
from workers.messages import DecodeReport
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=6, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def ask(cluster: LocalCluster, name: str, token_ids: list[int], max_tokens: int = 6) -> list[int]:
    """One request on an idle cluster; its answer."""
    cluster.submit(name, token_ids, greedy(max_tokens))
    return cluster.run()[name]


def held(decode: DecodeWorker, token_ids: list[int]) -> int:
    """How many of these tokens a prompt of them would find on the worker."""
    size = decode.runner.block_size
    return size * len(decode.blocks.find(block_hashes(token_ids, size)))


@cache
def expected(checkpoint, token_ids: tuple[int, ...], max_tokens: int = 6) -> list[int]:
    """The answer where nothing is kept anywhere."""
    return ask(LocalCluster(checkpoint, enable_prefix_caching=False), "r", list(token_ids), max_tokens)


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        (prompt(40), prompt(40), 32),
        (prompt(40), prompt(33), 32),
        (prompt(40), prompt(100), 32),
        (prompt(15), prompt(15), 0),
        (prompt(40), prompt(20) + prompt(20, seed=1), 16),
        (prompt(40), prompt(40, seed=1), 0),
        (prompt(32), prompt(32), 32),  # nothing is missing: the handoff brings the first token alone
        (prompt(100), prompt(48), 48),
    ],
)
def test_only_missing_blocks_are_handed_over(first, second, cached, one_pair, tiny_checkpoint):
    cluster, _, decode = one_pair()
    ask(cluster, "first", first)
    assert ask(cluster, "second", second) == expected(tiny_checkpoint("llama"), tuple(second))
    missing = blocks_for(len(second), 16) - cached // 16
    assert cluster.reports["second"].num_bytes == 3 * missing * decode.runner.kv_caches[0][0, 0].nbytes
    assert bool(cluster.reports["second"].num_parts) == bool(missing)
    assert [cluster.decode_reports[name].cached_tokens for name in ("first", "second")] == [0, cached]
    cluster.assert_all_blocks_free()


def test_the_next_turn_finds_the_answer(one_pair, tiny_checkpoint):
    """Three turns: each prompt is all that was said before and something new; only the new part moves."""
    cluster, _, decode = one_pair()
    block_bytes = 3 * decode.runner.kv_caches[0][0, 0].nbytes
    text = prompt(40)
    for turn in range(3):
        answer = ask(cluster, f"turn{turn}", text, 30)
        assert answer == expected(tiny_checkpoint("llama"), tuple(text), 30)
        known = 0 if turn == 0 else (len(text) - 10 - 1) // 16  # the last token of an answer is never computed
        assert cluster.reports[f"turn{turn}"].num_bytes == (blocks_for(len(text), 16) - known) * block_bytes
        assert cluster.decode_reports[f"turn{turn}"].cached_tokens == known * 16
        text = text + answer + prompt(10, seed=turn + 1)
    assert check_cached_blocks(cluster, cluster.decode.values(), [text], rtol=1e-3) > 8
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("prompt_len", range(10, 20))
def test_the_last_token_and_what_runs_behind_it_are_never_kept(prompt_len, one_pair):
    """At every place of the end in its block: only tokens that were computed are found, and their KV is theirs."""
    cluster, _, decode = one_pair()
    text = prompt(prompt_len)
    text += ask(cluster, "r", text, 20)
    assert held(decode, text) == (len(text) - 1) // 16 * 16
    assert set(decode.take_cache_update().stored) == set(block_hashes(text[:-1], 16))
    assert check_cached_blocks(cluster, cluster.decode.values(), [text], rtol=1e-3) == (len(text) - 1) // 16
    cluster.assert_all_blocks_free()


def test_what_was_generated_before_an_abort_is_kept(one_pair):
    """The gateway ends requests whose text has come to a stop string."""
    cluster, _, decode = one_pair()
    cluster.submit("r", prompt(20), greedy(100))
    while len(cluster.tokens["r"]) < 30:
        cluster.step()
    cluster.abort("r")
    cluster.run()
    text = prompt(20) + cluster.token_ids("r")
    assert held(decode, text) == (len(text) - 1) // 16 * 16
    assert check_cached_blocks(cluster, cluster.decode.values(), [text], rtol=1e-3) == 3
    cluster.assert_all_blocks_free()


def test_two_at_once_share_what_was_kept_and_grow_apart(one_pair, tiny_checkpoint):
    cluster, _, decode = one_pair(decode_blocks=16)
    ask(cluster, "first", prompt(96), 2)
    texts = [prompt(96) + prompt(5, seed=seed) for seed in range(4)]
    for number, text in enumerate(texts):
        cluster.submit(f"r{number}", text, greedy(20))
    for _ in range(12):
        cluster.step()
    shared = decode.blocks.find(block_hashes(prompt(96), 16))
    assert [decode.blocks.num_users(block) for block in shared] == [4] * 6
    cluster.run()
    for number, text in enumerate(texts):
        assert cluster.token_ids(f"r{number}") == expected(tiny_checkpoint("llama"), tuple(text), 20)
    cluster.assert_all_blocks_free()


def test_who_makes_room_leaves_shared_blocks_where_they_are(one_pair, tiny_checkpoint):
    """Sixteen blocks, six of them shared by all: sequences go to host memory and take their share again."""
    cluster, _, decode = one_pair(decode_blocks=16)
    preempted = 0
    ask(cluster, "first", prompt(96), 2)
    texts = [prompt(96) + prompt(5, seed=seed) for seed in range(4)]
    for number, text in enumerate(texts):
        cluster.submit(f"r{number}", text, greedy(60))
    while cluster.busy:
        cluster.step()
        poison_free_blocks(cluster.decode.values())
        preempted = max(preempted, decode.load.preempted)
    assert preempted > 0
    for number, text in enumerate(texts):
        assert cluster.token_ids(f"r{number}") == expected(tiny_checkpoint("llama"), tuple(text), 60)
    cluster.assert_all_blocks_free()
    check_cached_blocks(
        cluster,
        cluster.decode.values(),
        [text + cluster.token_ids(f"r{number}") for number, text in enumerate(texts)],
        rtol=1e-3,
    )


def test_who_comes_back_writes_only_what_is_not_here(one_pair, monkeypatch, tiny_checkpoint):
    cluster, _, _ = one_pair(decode_blocks=12)
    moved = {"away": 0, "back": 0}
    read, write = ModelRunner.read_blocks, ModelRunner.write_blocks

    def count_read(runner, blocks, group):
        moved["away"] += len(blocks)
        return read(runner, blocks, group)

    def count_write(runner, blocks, data, group):
        moved["back"] += len(blocks)
        assert data.shape[1] == len(blocks)
        write(runner, blocks, data, group)

    monkeypatch.setattr(ModelRunner, "read_blocks", count_read)
    monkeypatch.setattr(ModelRunner, "write_blocks", count_write)
    ask(cluster, "first", prompt(96), 2)
    for name in "ab":
        cluster.submit(name, prompt(96) + prompt(5, seed=ord(name)), greedy(64))
    cluster.run()
    assert moved["away"] > moved["back"] > 0
    for name in "ab":
        assert cluster.token_ids(name) == expected(
            tiny_checkpoint("llama"), (*prompt(96), *prompt(5, seed=ord(name))), 64
        )
    cluster.assert_all_blocks_free()


def test_memory_is_taken_from_what_nobody_uses(one_pair, tiny_checkpoint):
    cluster, _, decode = one_pair(decode_blocks=8)
    for seed in range(5):
        assert ask(cluster, f"r{seed}", prompt(90, seed=seed)) == expected(
            tiny_checkpoint("llama"), tuple(prompt(90, seed=seed))
        )
        assert decode.load.free_blocks == 8
    assert held(decode, prompt(90, seed=4)) == 80
    assert held(decode, prompt(90, seed=0)) == 0
    check_cached_blocks(cluster, cluster.decode.values(), [prompt(90, seed=seed) for seed in range(5)], rtol=1e-3)


def test_a_handoff_that_fails_leaves_nothing_to_find(one_pair, tiny_checkpoint):
    cluster, _, decode = one_pair(faults=Faults(seed=5, fail=1.0, max_delay=3))
    ask(cluster, "r", prompt(70))
    assert "r" in cluster.failures
    assert held(decode, prompt(70)) == 0
    assert decode.take_cache_update() is None
    cluster.fabric.faults = Faults()
    assert ask(cluster, "again", prompt(70)) == expected(tiny_checkpoint("llama"), tuple(prompt(70)))
    assert cluster.decode_reports["again"].cached_tokens == 0
    cluster.assert_all_blocks_free()


def test_quarantined_blocks_are_not_found_and_the_shared_ones_are_not_quarantined(one_pair, tiny_checkpoint):
    """A handoff of which nobody hears the end holds what was granted, and nothing else."""
    cluster, _, decode = one_pair()
    ask(cluster, "first", prompt(64))
    prefill_engine = next(iter(cluster.prefill))
    cluster.submit("lost", prompt(64) + prompt(40, seed=1), GREEDY)
    for _ in range(3):
        decode.step()
    assert decode.load.reserved_blocks == 3
    cluster.fabric.detach(prefill_engine)  # nobody answers any more
    decode.abort("lost")
    decode.step()
    assert (decode.load.reserved_blocks, decode.load.quarantined_blocks) == (0, 3)
    assert decode.load.free_blocks == decode.load.total_blocks - 3
    assert held(decode, prompt(64) + prompt(40, seed=1)) == 64
    decode.disconnect(prefill_engine)
    while decode.has_requests:
        decode.step()
    assert decode.load.free_blocks == decode.load.total_blocks
    assert held(decode, prompt(64)) == 64


def test_broken_logits_take_their_blocks_with_them(one_pair, tiny_checkpoint):
    """Also those that were here before: else whatever is wrong there fails every prompt that begins so."""
    cluster, _, decode = one_pair()
    ask(cluster, "first", prompt(64))
    (block, *_) = decode.blocks.find(block_hashes(prompt(64), 16))
    decode.runner.kv_caches[0][:, block] = torch.nan
    ask(cluster, "broken", prompt(70))
    assert isinstance(cluster.failures["broken"], SamplingError)
    assert held(decode, prompt(70)) == 0
    poison_free_blocks(cluster.decode.values())
    assert ask(cluster, "again", prompt(70)) == expected(tiny_checkpoint("llama"), tuple(prompt(70)))
    assert cluster.decode_reports["again"].cached_tokens == 0
    cluster.assert_all_blocks_free()


def test_what_was_forgotten_while_a_handoff_shared_it_stays_forgotten(one_pair):
    """Only what has arrived is entered when a handoff is complete; what was shared may have turned out wrong since."""
    cluster, _, decode = one_pair()
    ask(cluster, "first", prompt(64))
    cluster.submit("broken", prompt(64) + prompt(10, seed=1), greedy(50))
    while not decode.load.running:
        cluster.step()
    cluster.submit("sharing", prompt(64) + prompt(40, seed=2), GREEDY)
    decode.step()
    assert decode.load.reserved_blocks == 3
    (block, *_) = shared = decode.blocks.find(block_hashes(prompt(64), 16))
    decode.runner.kv_caches[0][:, block] = torch.nan
    while decode.load.running:
        for event in decode.step():
            cluster.take(event)
    assert (len(shared), held(decode, prompt(64))) == (4, 0)
    while cluster.busy:
        cluster.step()
        assert held(decode, prompt(64)) == 0
    assert set(cluster.failures) == {"broken", "sharing"}
    cluster.assert_all_blocks_free()


def test_it_can_be_switched_off(one_pair):
    cluster, _, decode = one_pair(enable_prefix_caching=False)
    for name in ("a", "b"):
        ask(cluster, name, prompt(40))
    assert cluster.reports["a"].num_bytes == cluster.reports["b"].num_bytes
    assert cluster.decode_reports["b"].cached_tokens == 0
    assert decode.take_cache_update() is None


def test_a_request_that_goes_on_elsewhere_is_found_by_all_its_tokens(one_pair):
    """Tokens that other workers have generated are part of what is handed over, and of what is kept."""
    cluster, _, decode = one_pair()
    text = prompt(30)
    text += ask(cluster, "r", text, 40)
    assert held(decode, text) == 64
    assert ask(cluster, "s", text[:50], 20) == text[50:70]
    assert cluster.decode_reports["s"] == DecodeReport(
        "s", cluster.decode_reports["s"].first_decode_s, 48, attempt_id="s"
    )


@pytest.mark.parametrize("seed", range(2))
def test_all_ranks_keep_and_share_the_same(seed, steps_ahead, tiny_checkpoint):
    """Blocks come and go, and sequences make room, on all ranks alike; what one grants is what the others grant."""
    checkpoint, rng = tiny_checkpoint("llama"), random.Random(seed)
    faults = Faults(seed=seed, max_delay=6)
    cluster = LockstepCluster(checkpoint, seed=seed, decode_blocks=16, faults=faults, steps_ahead=steps_ahead)
    texts = [prompt(80)[: rng.randint(20, 80)] + prompt(rng.randint(1, 20), seed=number) for number in range(6)]
    for number, text in enumerate(texts):
        cluster.submit(f"r{number}", text, greedy(20))
        for _ in range(rng.randint(0, 60)):
            cluster.step()
    cluster.run()
    for number, text in enumerate(texts):
        assert cluster.token_ids(f"r{number}") == expected(checkpoint, tuple(text), 20)
    assert sum(said.cached_tokens for said in cluster.decode_reports.values()) > 0
    cluster.assert_equal_ranks()
    cluster.assert_all_blocks_free()
    (decode,) = cluster.decode.values()
    stored, *others = [list(replica.worker.blocks.stored_blocks.items()) for replica in decode.replicas]
    assert stored
    assert others == [stored] * len(others)


@st.composite
def conversations(draw) -> list[tuple[int | None, float, list[int]]]:
    """Requests: which one each goes on from (None: none), how much of its prompt and answer it keeps, what is new."""
    turns: list[tuple[int | None, float, list[int]]] = []
    for number in range(draw(st.integers(3, 12))):
        parent = draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None
        kept = draw(st.sampled_from([0.3, 0.7, 1.0, 1.0]))
        turns.append((parent, kept, prompt(draw(st.integers(1, 30)), seed=draw(st.integers(0, 2)))))
    return turns


@given(
    turns=conversations(),
    block_size=st.sampled_from([8, 16]),
    spare_blocks=st.integers(0, 14),
    ahead=st.integers(0, 1),
    delay=st.sampled_from([0, 4, 20]),
    trouble=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
@fuzzed(10)
def test_answers_and_cache_are_those_without_keeping(
    turns, block_size, spare_blocks, ahead, delay, trouble, rng, tiny_checkpoint
):
    checkpoint = tiny_checkpoint("llama")
    texts: list[list[int]] = []
    answers: list[list[int]] = []
    lengths = [rng.randint(1, 40) for _ in turns]
    for (parent, kept, new), length in zip(turns, lengths, strict=True):
        before = texts[parent] + answers[parent] if parent is not None else []
        texts.append((before[: int(kept * len(before))] + new)[:120])
        answers.append(expected(checkpoint, tuple(texts[-1]), length))
    longest = max(len(text) + length for text, length in zip(texts, lengths, strict=True))
    cluster = LocalCluster(
        checkpoint,
        block_size=block_size,
        prefill_blocks=64,
        decode_blocks=blocks_for(longest + 1, block_size) + spare_blocks,
        max_num_batched_tokens=rng.choice([16, 33, 256]),
        decode_batched_tokens=rng.choice([16, 40]),
        max_num_seqs=4,
        layers_per_write=rng.choice([1, 2, 3]),
        steps_ahead=ahead,
        faults=Faults(seed=rng.randrange(1000), max_delay=delay, duplicate=0.1, fail=0.05 * trouble),
    )
    waiting, aborted = list(range(len(turns))), set()
    while waiting or cluster.busy:
        if waiting and rng.random() < 0.3:
            number = waiting.pop(0)
            submit = cluster.submit_local if rng.random() < 0.3 else cluster.submit
            submit(f"r{number}", texts[number], greedy(lengths[number]))
        if rng.random() < 0.02:
            aborted.add(victim := f"r{rng.randrange(len(turns))}")
            cluster.abort(victim)
        cluster.step()
        poison_free_blocks(cluster.decode.values())
    for number, answer in enumerate(answers):
        name = f"r{number}"
        if name in aborted or name in cluster.failures:
            assert answer[: len(cluster.token_ids(name))] == cluster.token_ids(name), number
        else:
            assert cluster.token_ids(name) == answer, number
    assert trouble or not cluster.failures
    cluster.assert_all_blocks_free()
    check_cached_blocks(
        cluster,
        cluster.decode.values(),
        [text + answer for text, answer in zip(texts, answers, strict=True)],
        rtol=1e-3,
    )
