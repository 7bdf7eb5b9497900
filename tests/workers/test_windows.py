"""Sliding windows through a pair of workers: the tokens of transformers, in the memory of a window."""

from __future__ import annotations

import random

import pytest

from cached_blocks import poison_free_blocks
from local_cluster import LocalCluster
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


@pytest.fixture(params=list(MODELS))
def checkpoint(request, tiny_checkpoint):
    """A model whose layers all have a window, and one of two groups."""
    return tiny_checkpoint(request.param, **MODELS[request.param])


def run_clean(cluster: LocalCluster) -> None:
    """To the end, with NaN in every block that is free and holds nothing: nobody reads what was given back."""
    while cluster.busy:
        cluster.step()
        poison_free_blocks((*cluster.prefill.values(), *cluster.decode.values()))
    assert cluster.failures == {}
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("budget", [19, 256])
def test_tokens_are_those_of_transformers(block_size, budget, checkpoint, local_cluster, reference_greedy):
    cluster = local_cluster(checkpoint, block_size=block_size, max_num_batched_tokens=budget)
    expected = {}
    for i, length in enumerate((5, 24, 31, 100, 160)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt(length, i), 40)
        cluster.submit(f"r{i}", prompt(length, i), greedy(40))
    run_clean(cluster)
    assert {name: cluster.token_ids(name) for name in expected} == expected
