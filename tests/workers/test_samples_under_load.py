"""Requests of one to four samples in too little memory, cancelled whole or sample by sample, over a faulty network."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from kv_transfer.transports.local import Faults
from local_cluster import LocalCluster
from workers.errors import HandoffError
from workers.sampling_params import SamplingParams

SEEDS = [3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_samples_of_one_seed_agree_and_no_block_is_lost(family, seed, tiny_checkpoint):
    """Whatever becomes of it, what a sample says is the beginning of what all of its prompt and seed say."""
    rng = random.Random(seed)
    cluster = LocalCluster(
        tiny_checkpoint(family),
        block_size=8,
        prefill_blocks=24,
        decode_blocks=rng.choice([20, 26]),
        max_num_batched_tokens=24,
        decode_batched_tokens=16,
        max_num_seqs=8,
        steps_ahead=seed % 3,
        prefill_steps_ahead=seed % 2,
        enable_prefix_caching=rng.random() < 0.7,
        faults=Faults(seed=seed, max_delay=4, fail=0.02, duplicate=0.1),
    )
    (decode,) = cluster.decode.values()
    prompts = [tuple(rng.randrange(3, 500) for _ in range(rng.randint(1, 60))) for _ in range(5)]
    asked: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
    for number in range(25):
        name, prompt = f"r{number}", rng.choice(prompts)
        sampling = SamplingParams(
            temperature=1.1,
            seed=rng.choice([1, 3]),
            n=rng.randint(1, 4),
            max_tokens=rng.randint(1, 20),
            ignore_eos=True,
            prompt_logprobs=rng.choice([None, None, 1]),
        )
        asked[name] = (prompt, sampling)
        (cluster.submit if rng.random() < 0.6 else cluster.submit_local)(name, list(prompt), sampling)
        for _ in range(rng.randint(0, 5)):
            cluster.step()
        if rng.random() < 0.2:
            cluster.abort(rng.choice(list(asked)))
        if rng.random() < 0.3:
            name = rng.choice(list(asked))
            decode.abort(name, rng.randrange(asked[name][1].n))
    cluster.run()
    cluster.assert_all_blocks_free()
    assert all(isinstance(error, HandoffError) for error in cluster.failures.values())
    said = defaultdict(list)
    for name, (prompt, sampling) in asked.items():
        for index in range(sampling.n):
            tokens = [output.token_id for output in cluster.tokens[name] if output.index == index]
            said[prompt, sampling.seed + index].append(tokens)
    assert sum(len(answers) > 1 for answers in said.values()) > 5
    for answers in said.values():
        longest = max(answers, key=len)
        assert all(answer == longest[: len(answer)] for answer in answers)
