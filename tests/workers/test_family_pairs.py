"""Every family on a pair of workers: blocks of several sizes, one chunk and many, too little memory, prefix hits."""

from __future__ import annotations

import random

import pytest

from cached_blocks import poison_free_blocks
from local_cluster import LocalCluster
from long_tails import slow_unless
from tiny_families import FAMILIES
from workers.sampling_params import SamplingParams

TOKENS = 40
OF_EACH_KIND = ("mistral", "gpt_oss", "deepseek_v3", "llama4")
"""Windows alone and with sinks, latents, chunks; three of them with experts; blocks of both sizes."""


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def run(cluster: LocalCluster, prompts: dict[str, list[int]]) -> int:
    """All at once to the end, with NaN in all that is free; the most sequences that were put aside."""
    for name, tokens in prompts.items():
        cluster.submit(name, tokens, SamplingParams(temperature=0.0, seed=0, max_tokens=TOKENS, ignore_eos=True))
    preempted = 0
    while cluster.busy:
        cluster.step()
        poison_free_blocks((*cluster.prefill.values(), *cluster.decode.values()))
        preempted = max(preempted, *(worker.load.preempted for worker in cluster.decode.values()))
    assert cluster.failures == {}
    cluster.assert_all_blocks_free()
    return preempted


@pytest.mark.parametrize(
    ("family", "block_size", "chunk"),
    slow_unless(
        lambda value: value[0] in OF_EACH_KIND,
        [(family, *((8, 13) if number % 2 else (32, 256))) for number, family in enumerate(FAMILIES)],
    ),
)
def test_who_makes_room_and_who_comes_again(family, block_size, chunk, tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint(family)
    whole = any(spec.window is None for spec in LocalCluster(checkpoint).model.kv_cache_groups)
    room = 112 if whole else 2 * (24 + 2 * block_size)  # tokens: less than four sequences come to hold
    cluster = LocalCluster(
        checkpoint, block_size=block_size, decode_blocks=-(-room // block_size), max_num_batched_tokens=chunk
    )
    first = {f"r{i}": prompt(6 + 5 * i, i) for i in range(4)}
    assert run(cluster, first) > 0
    again = {"again": first["r3"] + prompt(9, 7)}
    run(cluster, again)
    for name, tokens in (first | again).items():
        assert cluster.token_ids(name) == reference_greedy(checkpoint, tokens, TOKENS), name
