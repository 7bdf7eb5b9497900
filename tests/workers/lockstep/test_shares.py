"""Workers whose ranks keep the same are sent it once: the tokens of one rank, whatever happens on the way."""

from __future__ import annotations

import random

import pytest

from kv_transfer.transports.local import Faults
from lockstep_cluster import LockstepCluster
from lockstep_load import check_load, greedy, prompts


@pytest.mark.parametrize(("family", "size", "copies"), [("deepseek_v3", 2, 2), ("gemma2", 4, 2)])
def test_bytes_cross_once_for_all_that_keep_the_same(family, size, copies, tiny_checkpoint, reference_greedy):
    """Of latents, and of windows beside whole layers; also where a prompt's beginning is here and not sent again."""
    checkpoint = tiny_checkpoint(family)
    one, shared = (LockstepCluster(checkpoint, size=size, copies=each) for each in (1, copies))
    shared_prompt = prompts(1, seed=4, longest=60)[0] * 3
    for number, prompt in enumerate([*prompts(3, seed=3), shared_prompt, [*shared_prompt, 7, 8, 9]]):
        for cluster in (one, shared):
            cluster.submit(f"r{number}", prompt, greedy(12))
            cluster.run()
        answer = reference_greedy(checkpoint, prompt, 12)
        assert shared.token_ids(f"r{number}") == one.token_ids(f"r{number}") == answer
        assert copies * shared.reports[f"r{number}"].num_bytes == one.reports[f"r{number}"].num_bytes
    assert all(exchange.num_layers for exchange in shared.sides[1].exchanges)
    assert not any(exchange.num_layers for exchange in shared.sides[0].exchanges)
    shared.assert_all_blocks_free()
    shared.assert_equal_ranks()


def test_load_aborts_faults_and_preemption(tiny_checkpoint, reference_greedy):
    """Too few blocks, parts late and twice, some failed, requests cancelled at any moment: nothing is mixed up."""
    checkpoint, rng = tiny_checkpoint("deepseek_v3"), random.Random(5)
    pool = prompts(8, seed=21, longest=40)
    answers = [reference_greedy(checkpoint, prompt, 30) for prompt in pool]
    cluster = LockstepCluster(
        checkpoint,
        seed=2,
        prefill_blocks=24,
        decode_blocks=14,
        max_num_batched_tokens=48,
        faults=Faults(seed=3, max_delay=6, duplicate=0.2, fail=0.02),
        steps_ahead=1,
        copies=2,
    )
    assert check_load(cluster, pool, answers, rng, num_requests=40) > 10


@pytest.mark.parametrize("when", [3, 10])
def test_a_lost_prefill_worker_gives_all_ranks_their_blocks_back(when, tiny_checkpoint):
    checkpoint = tiny_checkpoint("deepseek_v3")
    cluster = LockstepCluster(checkpoint, seed=when, faults=Faults(seed=when, max_delay=8), copies=2)
    for number, prompt in enumerate(prompts(4, seed=when)):
        cluster.submit(f"r{number}", prompt, greedy(5))
    for _ in range(when):
        cluster.step()
    lost, decode = cluster.sides
    cluster.prefill.clear()
    for engine in lost.engines:
        cluster.fabric.detach(engine.engine_id)
    decode.disconnect(lost.engines[0].engine_id)
    cluster.run()
    cluster.assert_all_blocks_free()
    decode.assert_equal_ranks()
