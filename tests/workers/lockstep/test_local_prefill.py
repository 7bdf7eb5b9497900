"""Workers of several ranks that compute prompts between their decode steps: the ranks stay equal."""

from __future__ import annotations

import random

import pytest

from kv_transfer.transports.local import Faults
from lockstep_cluster import LockstepCluster
from lockstep_load import greedy, prompts
from workers.sampling_params import SamplingParams


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_local_and_remote_prompts_aborts_and_preemption_on_all_ranks_alike(
    steps_ahead, tiny_checkpoint, reference_greedy
):
    checkpoint = tiny_checkpoint("llama", num_hidden_layers=2)
    rng = random.Random(9)
    pool = prompts(5, seed=4, longest=40)
    answers = [reference_greedy(checkpoint, prompt, 20) for prompt in pool]
    cluster = LockstepCluster(
        checkpoint,
        seed=3,
        decode_blocks=7,
        decode_batched_tokens=20,
        faults=Faults(seed=1, max_delay=5),
        steps_ahead=steps_ahead,
    )
    asked: dict[str, tuple[int, int]] = {}
    cancelled: set[str] = set()
    preempted = 0
    for number in range(16):
        name, which, length = f"r{number}", rng.randrange(len(pool)), rng.randint(5, 20)
        asked[name] = (which, length)
        submit = cluster.submit_local if rng.random() < 0.6 else cluster.submit
        submit(name, pool[which], greedy(length))
        for _ in range(rng.randint(0, 5)):
            cluster.step()
            preempted += sum(load.preempted for load in cluster.loads.values())
        if rng.random() < 0.2:
            cancelled.add(victim := rng.choice(list(asked)))
            cluster.abort(victim)
    while cluster.busy:
        cluster.step()
        preempted += sum(load.preempted for load in cluster.loads.values())
    assert preempted > 0
    assert not cluster.failures
    for name, (which, length) in asked.items():
        got = cluster.token_ids(name)
        assert got == answers[which][: len(got)]
        assert len(got) == length or name in cancelled
    cluster.assert_all_blocks_free()
    cluster.assert_equal_ranks()


def test_sampled_tokens_are_those_of_one_rank(tiny_checkpoint, local_cluster):
    checkpoint = tiny_checkpoint("llama")
    sampling = SamplingParams(
        temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=5, max_tokens=8, ignore_eos=True, logprobs=2
    )
    alone = local_cluster(checkpoint, decode_batched_tokens=32)
    ranks = LockstepCluster(checkpoint, size=2, decode_batched_tokens=32)
    for cluster in (alone, ranks):
        for number, prompt in enumerate(prompts(3, seed=3, longest=60)):
            cluster.submit_local(f"r{number}", prompt, sampling)
    assert ranks.run() == alone.run()
    ranks.assert_equal_ranks()
