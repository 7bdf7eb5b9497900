"""A KV cache of eight bits: half the bytes, nearly the same logits, and the same bytes on both sides of a handoff."""

from __future__ import annotations

import random

import pytest
import torch

from attention.spec import FP8
from cache_groups import group_caches
from kv_transfer.errors import LayoutMismatchError
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from workers.kv_cache.sizing import kv_layout
from workers.models.loader import load_model
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling_params import SamplingParams

UNTOUCHED = 0x7F
"""NaN, which the test cluster fills its caches with."""


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)


def prompts(count: int, seed: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 512) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def one_worker(model, num_blocks: int = 17) -> ModelRunner:
    return ModelRunner(model, group_caches(model, num_blocks))


def alone(model, prompt: list[int], num_tokens: int) -> list[int]:
    """What one worker generates, prefill and decode over one cache."""
    runner, tokens, blocks = one_worker(model), list(prompt), [range(1, 17)]
    logits = runner.forward([Row(prompt, 0, blocks)])
    for _ in range(num_tokens):
        tokens.append(int(logits[0].argmax()))
        logits = runner.forward([Row(tokens[-1:], len(tokens) - 1, blocks)])
    return tokens[len(prompt) :]


class Remembering(LocalConnector):
    """A connector that keeps hold of the cache."""

    caches: dict[str, torch.Tensor]

    def register_kv_caches(self, name, kv_caches, layout):
        (self.caches[name],) = kv_caches
        return super().register_kv_caches(name, kv_caches, layout)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_logits_stay_close_to_those_of_a_full_cache(family, tiny_checkpoint):
    checkpoint = tiny_checkpoint(family)
    full, half = (load_model(checkpoint, "float32", kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    assert half.kv_cache_groups[0].dtype == FP8
    assert half.kv_cache_groups[0].bytes_per_block * 4 == full.kv_cache_groups[0].bytes_per_block
    for prompt in prompts(3, seed=1):
        rows = [Row(prompt, 0, [range(1, 17)])]
        expected, found = (one_worker(model).forward(rows) for model in (full, half))
        assert not torch.equal(expected, found)
        assert float(torch.nn.functional.cosine_similarity(expected, found)) > 0.97


@pytest.mark.parametrize("budget", [33, 1024])
def test_two_workers_give_what_one_does(budget, tiny_checkpoint, local_cluster):
    cluster = local_cluster(tiny_checkpoint("llama"), kv_cache_dtype="fp8", max_num_batched_tokens=budget)
    expected = {}
    for i, prompt in enumerate(prompts(5, seed=2)):
        expected[f"r{i}"] = alone(cluster.model, prompt, 20)
        cluster.submit(f"r{i}", prompt, greedy(20))
    assert cluster.run() == expected
    cluster.assert_all_blocks_free()


def test_the_handoff_carries_the_bytes_as_they_are(tiny_checkpoint, local_cluster):
    Remembering.caches = {}
    cluster = local_cluster(tiny_checkpoint("llama"), kv_cache_dtype="fp8", connector_class=Remembering)
    cluster.submit("r", prompts(1, seed=3)[0] + [7] * 48, greedy(2))
    cluster.run()
    spec = cluster.model.kv_cache_groups[0]
    prefill, decode = (Remembering.caches[name].view(torch.uint8) for name in ("prefill-0", "decode-0"))
    sent = 0
    for layer in range(spec.num_layers):
        arrived = {bytes(block.numpy()) for block in decode[layer].flatten(1)}
        for block in prefill[layer].flatten(1):
            if not bool((block == UNTOUCHED).any()):  # a block that prefill has filled
                assert bytes(block.numpy()) in arrived
                sent += 1
    assert sent >= 3 * spec.num_layers
    assert cluster.reports["r"].num_bytes % spec.bytes_per_block == 0


def test_preemption_loses_nothing(tiny_checkpoint, local_cluster):
    cluster = local_cluster(tiny_checkpoint("llama"), kv_cache_dtype="fp8", decode_blocks=9)
    expected, most_preempted = {}, 0
    for i, prompt in enumerate(prompts(5, seed=4, longest=20)):
        expected[f"r{i}"] = alone(cluster.model, prompt, 60)
        cluster.submit(f"r{i}", prompt, greedy(60))
    while cluster.busy:
        cluster.step()
        most_preempted = max(most_preempted, *(w.load.preempted for w in cluster.decode.values()))
    assert most_preempted > 0
    assert {r: cluster.token_ids(r) for r in expected} == expected
    cluster.assert_all_blocks_free()


def test_workers_that_store_in_different_dtypes_refuse_each_other(tiny_checkpoint):
    fabric, infos, connectors = LocalFabric(), [], []
    for name, dtype in (("prefill-0", "fp8"), ("decode-0", "auto")):
        spec = load_model(tiny_checkpoint("llama"), "float32", kv_cache_dtype=dtype).kv_cache_groups[0]
        connectors.append(LocalConnector(fabric))
        infos.append(connectors[-1].register_kv_caches(name, [spec.allocate(4, "cpu")], kv_layout([spec])))
    with pytest.raises(LayoutMismatchError, match="dtype is float8_e4m3fn here and float32 there"):
        connectors[0].connect(infos[1], 1.0)
