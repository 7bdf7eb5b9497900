"""Sliding windows through a pair of workers: the tokens of transformers, in the memory of a window."""

from __future__ import annotations

import random

import pytest
import torch

from cached_blocks import check_cached_blocks, poison_free_blocks
from kv_transfer.transports.local import Faults
from local_cluster import LocalCluster
from lockstep_cluster import LockstepCluster
from long_tails import slow_unless
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.windows import first_needed_block, most_window_blocks
from workers.messages import PrefillReport
from workers.sampling_params import SamplingParams

WINDOW = 24
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "layer_types": None}
"""Of three layers the first attends to everything."""
MODELS = {"mistral": {}, "qwen2": MIXED}


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture(
    params=slow_unless(
        lambda param: param.id in ("mistral-one step ahead", "qwen2-step by step"),
        [
            pytest.param((name, ahead), id=f"{name}-{words}")
            for name in MODELS
            for ahead, words in enumerate(("step by step", "one step ahead"))
        ],
    )
)
def model_and_steps(request):
    return request.param


@pytest.fixture
def checkpoint(model_and_steps, tiny_checkpoint):
    """A model whose layers all have a window, and one of two cache groups."""
    name, _ = model_and_steps
    return tiny_checkpoint(name, **MODELS[name])


@pytest.fixture
def steps_ahead(model_and_steps) -> int:
    """How many steps workers keep in flight."""
    return model_and_steps[1]


@pytest.fixture
def cluster_of(checkpoint, steps_ahead):
    """`cluster_of(**sizes)`: a pair of workers, both step by step or both one step ahead."""
    return lambda **sizes: LocalCluster(checkpoint, steps_ahead=steps_ahead, prefill_steps_ahead=steps_ahead, **sizes)


def workers_of(cluster: LocalCluster):
    return (*cluster.prefill.values(), *cluster.decode.values())


def run_clean(cluster: LocalCluster) -> int:
    """To the end, with NaN in all that is free: nobody reads what was given back. The most that were put aside."""
    preempted = 0
    while cluster.busy:
        cluster.step()
        poison_free_blocks(workers_of(cluster))
        preempted = max(preempted, *(worker.load.preempted for worker in cluster.decode.values()))
    assert cluster.failures == {}
    cluster.assert_all_blocks_free()
    for worker in workers_of(cluster):
        for group in worker.cache.groups:
            assert group.pool.num_free == group.pool.num_blocks
    return preempted


@pytest.mark.parametrize(("block_size", "budget"), [(8, 19), (16, 40), (16, 256)])
def test_tokens_are_those_of_transformers(block_size, budget, cluster_of, checkpoint, reference_greedy):
    cluster = cluster_of(block_size=block_size, max_num_batched_tokens=budget)
    expected = {}
    for i, length in enumerate((5, 24, 31, 100, 160)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt(length, i), 40)
        cluster.submit(f"r{i}", prompt(length, i), greedy(40))
    run_clean(cluster)
    assert {name: cluster.token_ids(name) for name in expected} == expected


@pytest.mark.parametrize("layers_per_write", [1, 2])
@pytest.mark.parametrize("length", [20, 24, 40, 100, 161])
def test_a_handoff_brings_a_window_alone(length, layers_per_write, cluster_of, checkpoint, reference_greedy):
    """Of the groups with a window no block that decode does not see is written, in any layer."""
    cluster = cluster_of(max_num_batched_tokens=48, layers_per_write=layers_per_write)
    cluster.submit("r", prompt(length), greedy(4))
    run_clean(cluster)
    assert cluster.token_ids("r") == reference_greedy(checkpoint, prompt(length), 4)
    expected = 0
    for spec in cluster.model.kv_cache_groups:
        first = 0 if spec.window is None else first_needed_block(length, WINDOW, 16)
        expected += (blocks_for(length, 16) - first) * spec.bytes_per_block
    assert cluster.reports["r"].num_bytes == expected


def test_a_prompt_takes_a_windows_memory_however_long_it_is(cluster_of, checkpoint, reference_greedy):
    """Ten times as long as the blocks of the window group would hold, on prefill, on decode, and where both are one."""
    budget = 16
    most = most_window_blocks(WINDOW, 2 * budget, 16)
    length = 10 * most * 16
    specs = cluster_of().model.kv_cache_groups
    groups = [blocks_for(length + 30, 16) if spec.window is None else most for spec in specs]
    sizes = {"prefill_blocks": groups, "decode_blocks": groups, "max_model_len": 2048, "decode_batched_tokens": budget}
    cluster = cluster_of(max_num_batched_tokens=budget, **sizes)
    text = prompt(length)
    cluster.submit("pair", text, greedy(30))
    held = 0
    while cluster.busy:
        cluster.step()
        for worker in workers_of(cluster):
            pool = worker.cache.groups[-1].pool
            held = max(held, len(pool.used_blocks))
    assert held <= most
    cluster.submit_local("alone", text, greedy(30))
    run_clean(cluster)
    expected = reference_greedy(checkpoint, text, 30)
    assert (cluster.token_ids("pair"), cluster.token_ids("alone")) == (expected, expected)


@pytest.mark.parametrize("local", [False, True])
def test_prompts_that_begin_alike_share_what_is_left(local, cluster_of, checkpoint, reference_greedy):
    """The next turn finds the end of the last one; a text that goes another way in its middle finds what is there."""
    cluster = cluster_of(decode_batched_tokens=48, max_num_batched_tokens=48)
    ask = cluster.submit_local if local else cluster.submit
    text = prompt(100)
    for turn in range(3):
        ask(f"turn{turn}", text, greedy(30))
        run_clean(cluster)
        answer = cluster.token_ids(f"turn{turn}")
        assert answer == reference_greedy(checkpoint, text, 30)
        text = text + answer + prompt(10, turn + 1)
    fork = text[:70] + prompt(30, seed=9)
    ask("fork", fork, greedy(20))
    run_clean(cluster)
    assert cluster.token_ids("fork") == reference_greedy(checkpoint, fork, 20)
    (decode,) = cluster.decode.values()
    (prefill,) = cluster.prefill.values()
    assert check_cached_blocks(cluster, [decode if local else prefill], [text, fork], rtol=1e-3) > 8


def test_a_prefix_is_computed_once(cluster_of):
    cluster = cluster_of(max_num_batched_tokens=40)
    reports = []
    take = cluster.take
    cluster.take = lambda event: (reports.append(event) if isinstance(event, PrefillReport) else None, take(event))
    for name, text in (("a", prompt(100)), ("b", prompt(100)), ("c", prompt(100) + prompt(30, 1))):
        cluster.submit(name, text, greedy(2))
        run_clean(cluster)
    assert [report.cached_tokens for report in reports] == [0, 96, 96]


def test_who_makes_room_comes_back_with_its_window(cluster_of, checkpoint, reference_greedy):
    two = len(cluster_of().model.kv_cache_groups) == 2
    cluster = cluster_of(decode_blocks=[12, 16] if two else 7)
    expected = {}
    for i in range(5):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt(6 + i, i), 60)
        cluster.submit(f"r{i}", prompt(6 + i, i), greedy(60))
    assert run_clean(cluster) > 0
    assert {name: cluster.token_ids(name) for name in expected} == expected


@pytest.mark.parametrize("seed", slow_unless((0).__eq__, range(3)))
def test_a_crowd_with_faults_and_aborts(seed, cluster_of, checkpoint, reference_greedy):
    """Parts late, in any order and twice, prompts on either side, requests cancelled at any moment, too few blocks."""
    rng = random.Random(seed)
    two = len(cluster_of().model.kv_cache_groups) == 2
    cluster = cluster_of(
        prefill_blocks=[24, 12] if two else 12,
        decode_blocks=[20, 12] if two else 11,
        max_num_batched_tokens=24,
        decode_batched_tokens=24,
        faults=Faults(seed=seed, max_delay=12, duplicate=0.3),
    )
    texts = [prompt(100)[: rng.randint(1, 100)] + prompt(rng.randint(1, 40), n) for n in range(12)]
    answers = [reference_greedy(checkpoint, text, 24) for text in texts]
    lengths: dict[str, tuple[int, int]] = {}
    for number in range(24):
        which, length = rng.randrange(12), rng.randint(1, 24)
        name = f"r{number}"
        lengths[name] = (which, length)
        ask = cluster.submit_local if rng.random() < 0.4 else cluster.submit
        ask(name, texts[which], greedy(length))
        for _ in range(rng.randint(0, 6)):
            cluster.step()
            poison_free_blocks(workers_of(cluster))
        if rng.random() < 0.25:
            gone = rng.choice(list(lengths))
            cluster.abort(gone)
            lengths.pop(gone)
            cluster.tokens.pop(gone, None)
    run_clean(cluster)
    for name, (which, length) in lengths.items():
        assert cluster.token_ids(name) == answers[which][:length], name
    check_cached_blocks(cluster, workers_of(cluster), texts, rtol=1e-3)


def test_two_ranks_stay_equal(checkpoint, steps_ahead, reference_greedy):
    cluster = LockstepCluster(
        checkpoint,
        prefill_blocks=24,
        decode_blocks=12,
        max_num_batched_tokens=24,
        decode_batched_tokens=24,
        steps_ahead=steps_ahead,
        faults=Faults(seed=3, max_delay=8),
    )
    expected = {}
    for i, length in enumerate((8, 30, 70, 120)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt(length, i), 20)
        (cluster.submit_local if i % 2 else cluster.submit)(f"r{i}", prompt(length, i), greedy(20))
    assert cluster.run() == expected
    cluster.assert_equal_ranks()
    cluster.assert_all_blocks_free()


def test_a_null_block_stays_zero(cluster_of):
    """Tables point at it where a block was given back; nobody ever writes to it."""
    cluster = cluster_of(decode_batched_tokens=32)
    for i, length in enumerate((40, 100)):
        cluster.submit(f"r{i}", prompt(length, i), greedy(40))
        cluster.submit_local(f"l{i}", prompt(length, i), greedy(40))
    run_clean(cluster)
    for worker in workers_of(cluster):
        assert not bool(worker.runner.kv_caches[-1][:, 0].any())
        assert bool(torch.isnan(worker.runner.kv_caches[-1][:, 1:]).any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_give_the_same_tokens(cluster_of, checkpoint, reference_greedy):
    """Short prompts and decode steps as CUDA graphs, over every cache group."""
    cluster = cluster_of(device="cuda", attention_backend="TRITON_ATTN", max_num_batched_tokens=64)
    expected = {}
    for i, length in enumerate((1, 24, 60, 100, 160)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt(length, i), 40)
        cluster.submit(f"r{i}", prompt(length, i), greedy(40))
    run_clean(cluster)
    assert {name: cluster.token_ids(name) for name in expected} == expected
