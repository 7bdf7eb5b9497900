"""Prefill as CUDA graphs: which prompts run so, and that nothing but the speed changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from attention.selection.registry import get_backend
from attention.spec import FP8
from cache_groups import group_caches
from workers.models.causal_lm import attention_specs
from workers.models.loader import load_model
from workers.models.registry import read_model
from workers.runner.input_batch import Row
from workers.runner.model_runner import ModelRunner
from workers.runner.prefill_graphs import PrefillGraphs, ladder
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True)
BLOCK_SIZE = 16
UNWRITTEN = 7.0


@pytest.mark.parametrize(
    ("longest", "max_position", "last"),
    [(8192, 131072, 1024), (512, 131072, 512), (513, 131072, 576), (20, 131072, 32), (8192, 512, 512)],
)
def test_the_ladder_ends_at_the_longest_prompt(longest, max_position, last):
    sizes = ladder(longest, max_position)
    assert sizes[-1] == last
    assert sizes == sorted(set(sizes))
    assert all(size % 32 == 0 for size in sizes)


def test_a_model_with_few_positions_has_no_graphs():
    assert ladder(8192, 31) == []


def test_models_with_experts_have_graphs_of_longer_prompts() -> None:
    assert ladder(8192, 8192)[-1] == 1024
    sparse = ladder(8192, 8192, sparse=True)
    assert sparse[-1] == 4096
    assert sparse[: len(ladder(8192, 8192))] == ladder(8192, 8192)
    assert ladder(2000, 8192, sparse=True)[-1] == 2048


def test_a_cpu_captures_nothing(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), "float32", "cpu", BLOCK_SIZE)
    runner = ModelRunner(model, group_caches(model, 4))
    runner.capture_prefill(512, lambda done, all_of_them: pytest.fail("nothing is captured"))
    assert runner.forward([Row([5, 6], 0, [[1]])]).shape == (1, model.config.vocab_size)


@pytest.mark.parametrize(("kv_cache_dtype", "captured"), [(None, True), (FP8, False)])
def test_an_fp8_cache_is_not_for_graphs(kv_cache_dtype, captured, tiny_checkpoint):
    """Prompts attend to it by way of block tables, which graphs do not follow."""
    model_class, config = read_model(tiny_checkpoint("llama"))
    backends = dict.fromkeys(attention_specs(config, kv_cache_dtype), get_backend("TRITON_ATTN"))
    model = model_class(config, backends, 16, torch.bfloat16, torch.device("cpu"), kv_cache_dtype)
    assert model.prefills_in_graphs == captured


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


TWO_GROUPS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": None}


def unwrite(runner: ModelRunner) -> None:
    for cache in runner.kv_caches:
        cache.fill_(UNWRITTEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.fixture(params=["llama", "qwen3", "mistral", "two cache groups"])
    def runner(self, request, tiny_checkpoint) -> ModelRunner:
        two = request.param == "two cache groups"
        checkpoint = tiny_checkpoint("qwen2", **TWO_GROUPS) if two else tiny_checkpoint(request.param)
        model = load_model(checkpoint, "float32", "cuda", BLOCK_SIZE, "TRITON_ATTN")
        return ModelRunner(model, [cache.fill_(UNWRITTEN) for cache in group_caches(model, 64)])

    @pytest.fixture
    def row(self, runner) -> Callable[..., Row]:
        """`row(tokens, start, blocks)`: with the same blocks in each cache group."""
        return lambda tokens, start, blocks, **others: Row(tokens, start, [blocks] * len(runner.groups), **others)

    def test_graphs_and_single_kernels_agree(self, runner, row):
        lengths = (1, 32, 33, 100)
        rows = [row(prompt(n, n), 0, random.Random(n).sample(range(64), -(-n // BLOCK_SIZE))) for n in lengths]
        expected = []
        for each in rows:
            logits = runner.forward([each]).clone()
            expected.append((logits, [cache.clone() for cache in runner.kv_caches]))
            unwrite(runner)
        told: list[tuple[int, int]] = []
        runner.capture_prefill(128, lambda done, total: told.append((done, total)))
        assert told == [(1, 3), (2, 3), (3, 3)]
        assert all((cache == UNWRITTEN).all() for cache in runner.kv_caches), "capturing stores nothing"
        torch.empty(1 << 22, device="cuda").fill_(-1)  # whatever the graphs read and nobody keeps is overwritten
        for each, (logits, caches) in zip(rows, expected, strict=True):
            layers: list[int] = []
            torch.testing.assert_close(runner.forward([each], layers.append), logits, rtol=1e-4, atol=1e-4)
            for found, cache in zip(runner.kv_caches, caches, strict=True):
                torch.testing.assert_close(found, cache, rtol=1e-4, atol=1e-4)
            assert layers == list(range(len(runner.places)))
            unwrite(runner)

    def test_a_layer_is_announced_when_its_keys_are_stored(self, runner, row):
        def layer_cache(layer: int) -> torch.Tensor:
            group, index = runner.places[layer]
            return runner.kv_caches[group][index]

        runner.capture_prefill(64)
        runner.forward([row(prompt(40), 0, [3, 1, 2])])
        stored = [layer_cache(layer).clone() for layer in range(len(runner.places))]
        unwrite(runner)
        seen = []

        def on_layer(layer: int) -> None:
            seen.append(torch.equal(layer_cache(layer), stored[layer]))
            if layer + 1 < len(runner.places):
                seen.append(bool((layer_cache(layer + 1) == UNWRITTEN).all()))

        runner.forward([row(prompt(40), 0, [3, 1, 2])], on_layer)
        assert len(seen) == 2 * len(runner.places) - 1
        assert all(seen)

    def test_what_is_no_short_prompt_alone_runs_kernel_by_kernel(self, runner, row, monkeypatch):
        runner.capture_prefill(64)
        monkeypatch.setattr(PrefillGraphs, "run", lambda *_: pytest.fail("it ran as graphs"))
        for rows in (
            [row(prompt(65), 0, range(5))],
            [row(prompt(20), 16, range(5))],
            [row(prompt(20), 0, range(5), wants_logits=False)],
            [row(prompt(20), 0, range(5)), row(prompt(20), 0, range(5, 10))],
        ):
            runner.forward(rows)

    def test_prefill_and_decode_give_the_tokens_of_the_reference(
        self, local_cluster, tiny_checkpoint, reference_greedy
    ):
        checkpoint = tiny_checkpoint("llama")
        cluster = local_cluster(checkpoint, device="cuda", attention_backend="TRITON_ATTN")
        expected = {}
        for i, length in enumerate((1, 31, 64, 90, 200)):
            expected[f"r{i}"] = reference_greedy(checkpoint, prompt(length, i), 8)
            cluster.submit(f"r{i}", prompt(length, i), GREEDY)
            cluster.run()
        assert {name: cluster.token_ids(name) for name in expected} == expected
        cluster.assert_all_blocks_free()
