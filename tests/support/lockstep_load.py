"""Requests for a `LockstepCluster`, some of them cancelled at any moment; every answer begins as the right one does."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lockstep_cluster import LockstepCluster
from right_answers import count_completed
from workers.errors import HandoffError
from workers.sampling_params import SamplingParams


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def check_load(
    cluster: LockstepCluster,
    pool: Sequence[list[int]],
    answers: Sequence[list[int]],
    rng: random.Random,
    num_requests: int,
) -> int:
    """Run so many requests through a cluster that is too small for them and whose network fails some.

    Args:
        cluster: with faults.
        pool: prompts to choose from.
        answers: their right ones, as long as any that is asked for.
        rng: chooses.
        num_requests: to send.

    Returns:
        How many were answered to their end.
    """
    longest = len(answers[0])
    asked: dict[str, tuple[int, int]] = {}
    cancelled: set[str] = set()
    preempted = 0
    for number in range(num_requests):
        request_id, which, length = f"r{number}", rng.randrange(len(pool)), rng.randint(1, longest)
        asked[request_id] = (which, length)
        cluster.submit(request_id, pool[which], greedy(length))
        for _ in range(rng.randint(0, 6)):
            cluster.step()
            preempted += sum(load.preempted for load in cluster.loads.values())
        if rng.random() < 0.3:
            victim = rng.choice(list(asked))
            cancelled.add(victim)
            cluster.abort(victim)
    cluster.run()
    completed = count_completed(cluster, asked, answers, cancelled)
    assert preempted > 0
    assert any(isinstance(error, HandoffError) for error in cluster.failures.values())
    cluster.assert_all_blocks_free()
    cluster.assert_equal_ranks()
    return completed
