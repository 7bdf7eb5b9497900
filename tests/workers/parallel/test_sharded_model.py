"""A model over several ranks against the same model on one: the same logits, the same tokens, each rank its shard."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from long_tails import slow_unless
from rank_work import ModelRun, run_model, run_models
from ranks import lone_rank, run_ranks
from workers.errors import ConfigError
from workers.models.loader import load_model, model_bytes
from workers.models.registry import read_model
from workers.parallel.group import SINGLE

TinyCheckpoint = Callable[..., Path]
Job = Callable[[str], tuple[Path, dict[str, Any]]]

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2-biased": ("deepseek_v2", {"attention_bias": True}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "cohere2": ("cohere2", {}),
    "cohere2-untied-biased": ("cohere2", {"tie_word_embeddings": False, "attention_bias": True}),
    "glm4": ("glm4", {}),
    "granite-biased": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "gpt_oss": ("gpt_oss", {}),
    "llama": ("llama", {}),
    "llama-uneven": ("llama", {"vocab_size": 517}),
    "llama-biased-mha": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama4-interleaved": ("llama4", {"interleave_moe_layer_step": 2}),
    "mistral": ("mistral", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-uneven": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 517}),
    "qwen2_moe-some-dense": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biased": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {}),
}
OF_EACH_KIND = (
    "cohere2-untied-biased",
    "deepseek_v2-biased",
    "gemma3",
    "gpt_oss",
    "llama",
    "llama-biased-mha",
    "llama-mqa",
    "llama4-interleaved",
    "qwen2-tied-uneven",
    "qwen2_moe-some-dense",
)
"""Norms behind and beside a block, latents, experts with a shared one and without, keys that ranks share, biases that
one rank adds, embeddings that are the head; the normal run has these."""
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "dummy": ("llama", {"dtype": "float32", "load_format": "dummy", "seed": 3}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "fp8 cache": ("llama", {"dtype": "float32", "kv_cache_dtype": "fp8"}),
}
"""Ways in which one of VARIATIONS can be run otherwise: how that goes with others is no matter of ranks."""
SIZES = slow_unless((2).__eq__, [2, 4])
RUNS = {
    "kinds": (*OF_EACH_KIND, *OTHERWISE),
    "rest": tuple(name for name in VARIATIONS if name not in OF_EACH_KIND),
}
"""What ranks run one after the other before they end."""
WHO = [pytest.param((size, run), id=f"{size}-{run}") for size in (2, 4) for run in RUNS]
"""How many ranks run what."""
TOGETHER = slow_unless(lambda param: param.id == "2-kinds", WHO)
NAMED = slow_unless(
    lambda param: param.values[0] == (2, "kinds"),
    [
        pytest.param(who.values[0], name, id=f"{who.values[0][0]}-{name}")
        for who in WHO
        for name in RUNS[who.values[0][1]]
    ],
)


@pytest.fixture(scope="module")
def job(tiny_checkpoint: TinyCheckpoint) -> Job:
    """Of a name: the model to run, and how; those of VARIATIONS in float32."""

    def made(name: str) -> tuple[Path, dict[str, Any]]:
        variation, settings = OTHERWISE.get(name, (name, {"dtype": "float32"}))
        family, overrides = VARIATIONS[variation]
        return tiny_checkpoint(family, **overrides), settings

    return made


@pytest.fixture(scope="module")
def alone(job: Job) -> Callable[[str], ModelRun]:
    """Of a name: what one rank says."""

    @functools.cache
    def run(name: str) -> ModelRun:
        folder, settings = job(name)
        return run_model(SINGLE, folder, **settings)

    return run


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, job: Job) -> list[dict[str, ModelRun]]:
    """What each rank said, of a size and one of RUNS."""
    size, run = request.param
    return run_ranks(size, run_models, {name: job(name) for name in RUNS[run]})


@pytest.mark.parametrize(("together", "name"), NAMED, indirect=["together"], scope="module")
def test_ranks_say_what_one_says(
    alone: Callable[[str], ModelRun], together: list[dict[str, ModelRun]], name: str
) -> None:
    if name == "bfloat16":
        agreement = torch.nn.functional.cosine_similarity(together[0][name].logits, alone(name).logits)
        assert float(agreement.min()) > 0.99
        return
    expected, spread = alone(name), alone(name).logits.std()
    atol = 0.05 if name == "fp8 cache" else 2e-5  # one rounding of a stored key differs, and is worth so much
    torch.testing.assert_close(together[0][name].logits / spread, expected.logits / spread, rtol=1e-5, atol=atol)
    if name != "fp8 cache":
        assert together[0][name].tokens == expected.tokens


@pytest.mark.parametrize(("together", "name"), NAMED, indirect=["together"], scope="module")
def test_ranks_agree_to_the_bit(together: list[dict[str, ModelRun]], name: str) -> None:
    for run in together[1:]:
        assert torch.equal(run[name].logits, together[0][name].logits)
        assert run[name].tokens == together[0][name].tokens


@pytest.mark.parametrize("together", TOGETHER, indirect=True)
def test_a_cache_holds_a_ranks_heads(alone: Callable[[str], ModelRun], together: list[dict[str, ModelRun]]) -> None:
    for name in together[0]:
        each = max(1, alone(name).num_kv_heads // len(together))
        assert [rank[name].num_kv_heads for rank in together] == [each] * len(together)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_gpus_say_what_one_says(tiny_checkpoint: TinyCheckpoint, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    jobs = {name: (tiny_checkpoint(name), {"dtype": "float32"}) for name in ("llama", "qwen2", "qwen3")}
    (expected,) = run_ranks(1, run_models, jobs, device="cuda")
    ranks = run_ranks(size, run_models, jobs, device="cuda")
    for name, run in expected.items():
        torch.testing.assert_close(ranks[0][name].logits, run.logits, rtol=1e-3, atol=2e-3)
        assert all(torch.equal(rank[name].logits, ranks[0][name].logits) for rank in ranks)


def rows(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return tensor.chunk(size, dim=0)[rank]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_its_shard(tiny_checkpoint: TinyCheckpoint, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM's: rows of what comes first in a block, columns of what comes second, by head."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # weights stay as they are loaded
    folder = tiny_checkpoint("qwen2", num_key_value_heads=2, vocab_size=517)
    stored = load_file(folder / "model.safetensors")
    prefix = "model.layers.1"
    for rank in range(size):
        own = dict(load_model(folder, dtype="float32", group=lone_rank(rank, size)).named_parameters())
        attention = f"{prefix}.self_attn"
        for kind in ("weight", "bias"):
            query = rows(stored[f"{attention}.q_proj.{kind}"], rank, size)
            kv = [stored[f"{attention}.{name}_proj.{kind}"].chunk(2)[rank * 2 // size] for name in "kv"]
            assert torch.equal(own[f"layers.1.self_attention.qkv_proj.{kind}"], torch.cat([query, *kv]))
        gate_up = [rows(stored[f"{prefix}.mlp.{name}_proj.weight"], rank, size) for name in ("gate", "up")]
        assert torch.equal(own["layers.1.mlp.gate_up_proj.weight"], torch.cat(gate_up))
        for theirs, ours in (("self_attn.o_proj", "self_attention.o_proj"), ("mlp.down_proj", "mlp.down_proj")):
            columns = stored[f"{prefix}.{theirs}.weight"].chunk(size, dim=1)[rank]
            assert torch.equal(own[f"layers.1.{ours}.weight"], columns)
        head = rows(stored["lm_head.weight"], rank, size)
        assert torch.equal(own["lm_head.weight"][: len(head)], head)
        assert torch.equal(own["embed_tokens"][:517], stored["model.embed_tokens.weight"])


def test_a_rank_tells_of_the_bytes_that_it_reads(tiny_checkpoint: TinyCheckpoint) -> None:
    folder, totals = tiny_checkpoint("llama"), []
    for rank in range(4):
        calls: list[tuple[int, int]] = []
        group = lone_rank(rank, 4)
        model = load_model(folder, progress=lambda *call, calls=calls: calls.append(call), group=group)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1] == (calls[-1][1],) * 2
        assert calls[-1][1] == model_bytes(type(model), model.config, torch.float32, group)
        totals.append(calls[-1][1])
    assert max(totals) < 0.6 * model_bytes(type(model), model.config, torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_random_weights_are_shards_of_one_model(
    tiny_checkpoint: TinyCheckpoint, size: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr("workers.models.random_weights.CHUNK_ELEMENTS", 1000)
    folder = tiny_checkpoint(family)

    def parameters(rank: int, size: int) -> dict[str, torch.Tensor]:
        model = load_model(folder, "float32", load_format="dummy", seed=5, group=lone_rank(rank, size))
        return dict(model.named_parameters())

    whole, shards = parameters(0, 1), [parameters(rank, size) for rank in range(size)]
    assert float(whole["lm_head.weight"].std()) == pytest.approx(0.02, rel=0.05)
    for name in ("lm_head.weight", "layers.2.self_attention.o_proj.weight", "layers.2.mlp.down_proj.weight"):
        joined = torch.cat([shard[name] for shard in shards], dim=0 if name.startswith("lm_head") else 1)
        assert torch.equal(joined, whole[name]), name
    queries = torch.cat([shard["layers.0.self_attention.qkv_proj.weight"][: 64 // size] for shard in shards])
    assert torch.equal(queries, whole["layers.0.self_attention.qkv_proj.weight"][:64])
    gates = torch.cat([shard["layers.0.mlp.gate_up_proj.weight"][: 96 // size] for shard in shards])
    assert torch.equal(gates, whole["layers.0.mlp.gate_up_proj.weight"][:96])
    assert not torch.equal(
        whole["layers.0.self_attention.o_proj.weight"], whole["layers.1.self_attention.o_proj.weight"]
    )


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({}, 3, "tensor parallelism of 3 does not divide the model's num_heads, which is 4"),
        ({"intermediate_size": 98}, 4, "does not divide the model's intermediate_size, which is 98"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96},
            4,
            "neither divides the model's num_kv_heads nor is a multiple of it, which is 6",
        ),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(
    tiny_checkpoint: TinyCheckpoint, overrides: dict[str, Any], size: int, message: str
) -> None:
    folder = tiny_checkpoint("llama", **overrides)
    with pytest.raises(ConfigError, match=message):
        load_model(folder, group=lone_rank(0, size))
    with pytest.raises(ConfigError, match=message):
        read_model(folder)[1].check_divisible(size)
