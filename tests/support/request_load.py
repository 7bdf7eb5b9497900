"""Requests of mixed lengths for a cluster of workers, and how they are sent to it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from local_cluster import LocalCluster
from workers.sampling_params import SamplingParams


@dataclass(frozen=True)
class LoadRequest:
    """One request of a load."""

    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams


def mixed_requests(
    count: int, *, vocab_size: int, longest_prompt: int, longest_output: int, seed: int = 0, sampled: bool = False
) -> list[LoadRequest]:
    """Prompts from one token up, short ones more often than long ones, each with its own number of output tokens.

    Greedy, or every second one drawn at temperature 0.8 from a seed of its own.
    """
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        length = max(1, round(longest_prompt ** rng.random()))
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(length))
        drawn = sampled and number % 2 == 1
        sampling = SamplingParams(
            temperature=0.8 if drawn else 0.0,
            seed=rng.getrandbits(64),
            max_tokens=rng.randint(1, longest_output),
            ignore_eos=True,
        )
        requests.append(LoadRequest(f"r{number}", prompt, sampling))
    return requests


def run_one_by_one(cluster: LocalCluster, requests: Sequence[LoadRequest]) -> dict[str, list[int]]:
    """Every request alone: the next one is sent when the one before has ended."""
    for request in requests:
        cluster.submit(request.name, list(request.prompt), request.sampling)
        cluster.run()
    return {request.name: cluster.token_ids(request.name) for request in requests}


def run_under_load(cluster: LocalCluster, requests: Sequence[LoadRequest], seed: int = 1) -> dict[str, list[int]]:
    """All of them at nearly the same time, in batches that change with every step."""
    rng = random.Random(seed)
    for request in requests:
        cluster.submit(request.name, list(request.prompt), request.sampling)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            cluster.step()
    cluster.run()
    assert not cluster.failures, cluster.failures
    return {request.name: cluster.token_ids(request.name) for request in requests}


def differing(expected: dict[str, list[int]], found: dict[str, list[int]]) -> list[str]:
    """Names of the requests whose tokens are not the same."""
    assert expected.keys() == found.keys()
    return [name for name in expected if expected[name] != found[name]]
