"""Models against transformers, for every family and what varies within it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from long_tails import slow_unless
from tiny_families import FAMILIES, variations
from workers.models.loader import load_model

VARIATIONS = variations()
TinyCheckpoint = Callable[..., Path]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


@pytest.fixture(params=VARIATIONS)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    family, overrides = VARIATIONS[request.param]
    return tiny_checkpoint(family, **overrides)


def test_logits_equal_transformers(checkpoint: Path, reference: Any, paged_run: Any) -> None:
    """The same prompt in one chunk, in several, and token by token through the paged cache."""
    ids = prompt(75)
    expected = reference(checkpoint).logits(ids)
    decoder = load_model(checkpoint, dtype="float32", block_size=16)
    run = paged_run(decoder, num_sequences=3, max_tokens=80)
    (whole,) = run.step({0: ids})
    chunked = torch.cat([run.step({1: ids[a:b]})[0] for a, b in ((0, 20), (20, 21), (21, 64), (64, 75))])
    stepped = torch.cat([run.step({2: ids[:55]})[0], *(run.step({2: [token]})[0] for token in ids[55:])])
    spread = expected.std()
    for ours in (whole, chunked, stepped):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours / spread, expected / spread, rtol=1e-4, atol=2e-4)


_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "scaling", "num_tokens", "max_model_len"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}, 75, None),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, 75, None),
        ("llama", {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64}, 75, None),
        ("llama", _LONGROPE, 60, 64),
        ("llama", _LONGROPE, 75, None),
        ("phi3", _LONGROPE, 60, 64),
        ("phi3", _LONGROPE, 75, None),
    ],
)
def test_logits_of_scaled_rope_equal_transformers(
    family: str,
    scaling: dict[str, Any],
    num_tokens: int,
    max_model_len: int | None,
    tiny_checkpoint: TinyCheckpoint,
    reference: Any,
    paged_run: Any,
) -> None:
    """LongRoPE's short set where nothing longer is served than it was made for, and its long set where it is."""
    beside = {"original_max_position_embeddings": 64} if family == "phi3" else {}
    checkpoint = tiny_checkpoint(family, rope_parameters={"rope_theta": 10000.0, **scaling}, **beside)
    expected = reference(checkpoint).logits(prompt(num_tokens))
    decoder = load_model(checkpoint, dtype="float32", block_size=16, max_model_len=max_model_len)
    assert decoder.max_model_len == (max_model_len or decoder.config.max_position_embeddings)
    run = paged_run(decoder, num_sequences=1, max_tokens=80)
    ids = prompt(num_tokens)
    ours = torch.cat([run.step({0: ids[:30]})[0], run.step({0: ids[30:]})[0]])
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "backend"),
    slow_unless(
        lambda value: value[1] == FAMILIES[value[0]].backends[0] or value[0] in ("llama", "gemma3"),
        [
            (name, backend)
            for name, (family, _) in VARIATIONS.items()
            if name == family  # of variations the logits are compared, above
            for backend in FAMILIES[family].backends
        ],
    ),
)
def test_greedy_tokens_equal_transformers(
    tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any, name: str, backend: str
) -> None:
    """Sequences of different lengths decoded together, beyond every sliding window."""
    family, overrides = VARIATIONS[name]
    checkpoint = tiny_checkpoint(family, **overrides)
    prompts = [prompt(length, seed=length) for length in (1, 16, 33, 50)]
    expected = [reference(checkpoint).greedy(ids, 16) for ids in prompts]
    decoder = load_model(checkpoint, dtype="float32", block_size=16, backend_name=backend)
    assert paged_run(decoder, num_sequences=4, max_tokens=96).greedy(prompts, 16) == expected


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_sizes_change_nothing(
    tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any, block_size: int
) -> None:
    folder = tiny_checkpoint("mistral")
    prompts = [prompt(60, seed=1), prompt(70, seed=2)]
    decoder = load_model(folder, dtype="float32", block_size=block_size)
    expected = [reference(folder).greedy(ids, 20) for ids in prompts]
    assert paged_run(decoder, num_sequences=2, max_tokens=96).greedy(prompts, 20) == expected


def test_prefill_and_decode_in_one_batch(tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any) -> None:
    folder = tiny_checkpoint("qwen3")
    first, second = prompt(40, seed=1), prompt(30, seed=2)
    expected = reference(folder)
    run = paged_run(load_model(folder, dtype="float32"), num_sequences=2, max_tokens=64)
    run.step({0: first[:39]})
    mixed = run.step({0: first[39:], 1: second})
    torch.testing.assert_close(mixed[0], expected.logits(first)[39:], rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(mixed[1], expected.logits(second), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_stays_close(
    tiny_checkpoint: TinyCheckpoint, reference: Any, paged_run: Any, family: str, dtype: str
) -> None:
    folder = tiny_checkpoint(family)
    ids = prompt(50)
    decoder = load_model(folder, dtype=dtype)
    run = paged_run(decoder, num_sequences=1, max_tokens=64)
    ours = torch.cat([run.step({0: ids[:30]})[0], run.step({0: ids[30:49]})[0], run.step({0: ids[49:]})[0]])
    assert decoder.kv_cache_groups[0].dtype == getattr(torch, dtype)
    assert ours.dtype == torch.float32
    expected = reference(folder).logits(ids)
    agreement = torch.nn.functional.cosine_similarity(ours, expected, dim=-1)
    assert float(agreement.min()) > 0.99


def test_on_layer_comes_in_order_when_the_layer_is_in_the_cache(
    tiny_checkpoint: TinyCheckpoint, paged_run: Any
) -> None:
    run = paged_run(load_model(tiny_checkpoint("llama"), dtype="float32"), num_sequences=1, max_tokens=20)
    seen: list[tuple[int, list[bool]]] = []

    def written() -> list[bool]:
        return [not bool(layer[run.tables[0][0]].isnan().any()) for layer in run.caches[0]]

    run.step({0: prompt(18)}, on_layer=lambda i: seen.append((i, written())))
    assert seen == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]


def test_unpacked_weights_give_the_same_tokens(
    tiny_checkpoint: TinyCheckpoint, paged_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has no packed kernels, plain ones take their place."""
    for family, overrides in (
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
    ):
        folder = tiny_checkpoint(family, **overrides)
        packed = load_model(folder, dtype="float32")
        with monkeypatch.context() as patched:
            patched.setattr(torch.backends.mkldnn, "is_available", lambda: False)
            plain = load_model(folder, dtype="float32")
        prompts = [prompt(20)]
        runs = [paged_run(model, num_sequences=1, max_tokens=64).greedy(prompts, 20) for model in (packed, plain)]
        assert runs[0] == runs[1]


def test_the_kv_cache_that_a_model_needs(tiny_checkpoint: TinyCheckpoint) -> None:
    spec = load_model(tiny_checkpoint("qwen3"), dtype="bfloat16", block_size=32).kv_cache_groups[0]
    assert (spec.num_layers, spec.num_kv_heads, spec.head_size, spec.block_size) == (3, 2, 32, 32)
    assert spec.dtype == torch.bfloat16
