"""Prefill on one worker, decode on another: the same tokens as `transformers`, whatever the shape of the cluster."""

from __future__ import annotations

import random

import pytest

from long_tails import slow_unless
from workers.sampling_params import SamplingParams


def greedy(max_tokens: int, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True, **kwargs)


def prompts(count: int, seed: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    "family",
    slow_unless(
        ("gemma3", "llama3", "qwen2").__contains__,
        ["gemma2", "gemma3", "llama", "llama3", "mistral", "qwen2", "qwen3"],
    ),
)
@pytest.mark.parametrize("tied", slow_unless((False).__eq__, [False, True]))
def test_alone(family, tied, tiny_checkpoint, local_cluster, reference_greedy):
    checkpoint = tiny_checkpoint(family, tie_word_embeddings=tied)
    cluster = local_cluster(checkpoint)
    prompt = prompts(1, seed=7)[0]
    cluster.submit("r", prompt, greedy(40))
    assert cluster.run()["r"] == reference_greedy(checkpoint, prompt, 40)
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize(
    "family",
    slow_unless(
        ("gpt_oss", "llama").__contains__,
        ["gpt_oss", "llama", "llama3", "llama4", "mistral", "qwen2", "qwen3"],
    ),
)
@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 3)])
def test_concurrent_mixed_lengths(family, num_prefill, num_decode, tiny_checkpoint, local_cluster, reference_greedy):
    checkpoint = tiny_checkpoint(family)
    cluster = local_cluster(checkpoint, num_prefill=num_prefill, num_decode=num_decode)
    rng = random.Random(1)
    expected = {}
    for i, prompt in enumerate(prompts(12, seed=2)):
        length = rng.randint(1, 30)
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, length)
        cluster.submit(f"r{i}", prompt, greedy(length))
        for _ in range(rng.randint(0, 4)):
            cluster.step()
    assert cluster.run() == expected
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize(
    ("block_size", "budget", "layers_per_write"),
    [
        pytest.param(size, budget, layers, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow])
        for i, size in enumerate((16, 32, 64))
        for j, budget in enumerate((7, 33, 1024))
        for k, layers in enumerate((1, 2, 3))
    ],
)
def test_block_sizes_and_chunks(block_size, budget, layers_per_write, tiny_checkpoint, local_cluster, reference_greedy):
    """Every pair of settings; what takes long has all three together."""
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(
        checkpoint, block_size=block_size, max_num_batched_tokens=budget, layers_per_write=layers_per_write
    )
    expected = {}
    for i, prompt in enumerate(prompts(4, seed=3, longest=130)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 12)
        cluster.submit(f"r{i}", prompt, greedy(12))
    assert cluster.run() == expected
    for i, prompt in enumerate(prompts(4, seed=3, longest=130)):
        blocks = -(-len(prompt) // block_size)
        model = cluster.model.config
        layer_bytes = 2 * block_size * model.attention[0].num_kv_heads * model.attention[0].head_size * 4
        assert cluster.reports[f"r{i}"].num_bytes == blocks * layer_bytes * model.num_layers
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 2)])
def test_latents_are_handed_over(num_prefill, num_decode, tiny_checkpoint, local_cluster, reference_greedy):
    """A block is one latent a token, in pools that are too small for their load."""
    checkpoint = tiny_checkpoint("deepseek_v3")
    cluster = local_cluster(checkpoint, num_prefill=num_prefill, num_decode=num_decode, decode_blocks=9)
    expected = {}
    for i, prompt in enumerate(prompts(4, seed=4, longest=40)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 30)
        cluster.submit(f"r{i}", prompt, greedy(30))
    assert cluster.run() == expected
    for i, prompt in enumerate(prompts(4, seed=4, longest=40)):
        assert cluster.reports[f"r{i}"].num_bytes == -(-len(prompt) // 16) * 3 * 16 * (24 + 8) * 4
    cluster.assert_all_blocks_free()


def test_preemption_loses_no_token(tiny_checkpoint, local_cluster, reference_greedy):
    """A decode pool too small for its load moves sequences to host memory and back."""
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint, decode_blocks=9)
    expected, most_preempted = {}, 0
    for i, prompt in enumerate(prompts(5, seed=4, longest=20)):
        expected[f"r{i}"] = reference_greedy(checkpoint, prompt, 60)
        cluster.submit(f"r{i}", prompt, greedy(60))
    while cluster.busy:
        cluster.step()
        most_preempted = max(most_preempted, *(w.load.preempted for w in cluster.decode.values()))
    assert most_preempted > 0
    assert {r: cluster.token_ids(r) for r in expected} == expected
    cluster.assert_all_blocks_free()


def test_first_token_may_end_the_request(tiny_checkpoint, local_cluster, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    cluster = local_cluster(checkpoint)
    prompt = prompts(1, seed=5)[0]
    first = reference_greedy(checkpoint, prompt, 1)[0]
    cluster.submit("stop", prompt, SamplingParams(temperature=0, seed=0, max_tokens=9, stop_token_ids=(first,)))
    cluster.submit("length", prompt, greedy(1))
    assert cluster.run() == {"stop": [first], "length": [first]}
    assert cluster.tokens["stop"][0].finish_reason.value == "stop"
    assert cluster.tokens["length"][0].finish_reason.value == "length"
    cluster.assert_all_blocks_free()


def test_seed_gives_the_same_tokens_in_any_company(tiny_checkpoint, local_cluster):
    checkpoint = tiny_checkpoint("qwen2")
    prompt = prompts(1, seed=6)[0]
    sampling = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, seed=1234, max_tokens=25, ignore_eos=True, repetition_penalty=1.1
    )
    alone = local_cluster(checkpoint)
    alone.submit("r", prompt, sampling)
    crowd = local_cluster(checkpoint, num_prefill=2, num_decode=2, max_num_batched_tokens=50)
    for i, other in enumerate(prompts(6, seed=8)):
        crowd.submit(f"other{i}", other, SamplingParams(seed=i, max_tokens=20, ignore_eos=True))
    crowd.submit("r", prompt, sampling)
    assert crowd.run()["r"] == alone.run()["r"]


def test_the_context_window_ends_a_request(tiny_checkpoint, local_cluster):
    cluster = local_cluster(tiny_checkpoint("llama"), max_model_len=64)
    cluster.submit("r", prompts(1, seed=9, longest=40)[0], greedy(1000))
    tokens = cluster.run()["r"]
    assert len(prompts(1, seed=9, longest=40)[0]) + len(tokens) == 64
    assert cluster.tokens["r"][-1].finish_reason.value == "length"


def test_a_prompt_that_can_never_fit_is_refused(tiny_checkpoint, local_cluster):
    cluster = local_cluster(tiny_checkpoint("llama"), decode_blocks=2)
    cluster.submit("r", [5] * 40, greedy(4))
    cluster.run()
    assert "3 KV blocks" in str(cluster.failures["r"])
    cluster.assert_all_blocks_free()
