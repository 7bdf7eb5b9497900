"""Models whose experts stay in MXFP4, and the same ones with plain experts: one KV cache, one answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.kv_cache import as_stored
from attention.spec import Phase
from cache_groups import unwritten_caches
from local_cluster import LocalCluster
from ranks import lone_rank
from workers.errors import ConfigError
from workers.kv_cache.sizing import kv_layout
from workers.layers.moe.mxfp4 import Mxfp4Weight
from workers.models.causal_lm import CausalLM
from workers.models.loader import load_model
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def packed(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A small gpt-oss in the form in which the family was published; 128 inner features."""
    return pack(tiny_checkpoint("gpt_oss", intermediate_size=128), tmp_path)


def pack(folder: Path, packed: Path) -> Path:
    """The same with other experts, in MXFP4."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inputs, outputs = tensor.shape
            shape = (num_experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            scales = torch.randint(119, 123, shape[:-1], dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = scales
            del tensors[name]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return packed


def load(folder: Path, expert_weights: str, rank: int = 0, size: int = 1, **settings: Any) -> CausalLM:
    settings = {"dtype": "bfloat16", **settings}
    return load_model(folder, expert_weights=expert_weights, group=lone_rank(rank, size), **settings)


def is_kept(model: CausalLM) -> bool:
    experts: Any = model.layers[1].mlp.experts
    kept = [isinstance(each.all_experts(), Mxfp4Weight) for each in (experts.gate_up_proj, experts.down_proj)]
    assert len(set(kept)) == 1
    return kept[0]


def dequantized(model: CausalLM, layer: int, name: str) -> torch.Tensor:
    """(E, M, K) of what a model computes with."""
    experts: Any = model.layers[layer].mlp.experts
    weight = getattr(experts, name).all_experts()
    num_experts, _, num_inputs = weight.shape
    if weight.bias is not None:
        weight = type(weight)(*[getattr(weight, each) for each in weight.__dataclass_fields__ if each != "added"])
    one = torch.eye(num_inputs, dtype=weight.dtype)
    return torch.stack([weight.linear(expert, one).t() for expert in range(num_experts)])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_keeps_its_share(packed: Path, size: int) -> None:
    for rank in range(size):
        kept, plain = (load(packed, form, rank, size) for form in ("mxfp4", "dequantized"))
        assert (is_kept(kept), is_kept(plain)) == (True, False)
        assert kept.identity == plain.identity
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(dequantized(kept, 1, name), dequantized(plain, 1, name))
        experts_bytes = 3 * 4 * 3 * 64 * 128 // size
        assert plain.weights_bytes - kept.weights_bytes == experts_bytes * 2 - experts_bytes * 17 // 32


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_identity_whether_they_are_kept_or_not(packed: Path, dtype: str, load_format: str) -> None:
    """Random weights are the same numbers, too."""
    kept, plain = (load(packed, form, dtype=dtype, load_format=load_format) for form in ("mxfp4", "dequantized"))
    assert kept.identity == plain.identity
    tensors = load_file(packed / "model.safetensors")
    if load_format == "auto":
        tensors["model.layers.2.mlp.experts.down_proj_blocks"][1, 2, 0, 3] ^= 1
        save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
        others = [load(packed, form, dtype=dtype) for form in ("mxfp4", "dequantized")]
        assert [each.split(" ")[0] for each in kept.identity.differences(others[0].identity)] == ["weights"]
        assert others[0].identity == others[1].identity


class MixedCluster(LocalCluster):
    """Prefill workers with plain experts, decode workers that keep them."""

    models: dict[str, CausalLM]

    def _end(self, name: str, num_blocks: Any, connector_class: Any) -> Any:
        model = self.models[name.split("-")[0]]
        caches = unwritten_caches(model, num_blocks)
        connector = connector_class(self.fabric)
        layout = kv_layout(model.kv_cache_groups, identity=model.identity)
        info = connector.register_kv_caches(name, [as_stored(cache) for cache in caches], layout)
        return ModelRunner(model, caches), connector, info


def test_a_prefill_worker_with_plain_experts_hands_over(packed: Path) -> None:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=12, ignore_eos=True)
    prompts = {"short": [7, 40, 3], "long": [3 + 11 * i % 500 for i in range(50)]}
    answers = []
    for forms in ({"prefill": "dequantized", "decode": "mxfp4"}, {"prefill": "dequantized", "decode": "dequantized"}):
        MixedCluster.models = {role: load(packed, form, dtype="float32") for role, form in forms.items()}
        assert is_kept(MixedCluster.models["decode"]) == (forms["decode"] == "mxfp4")
        cluster = MixedCluster(packed)
        for name, prompt in prompts.items():
            cluster.submit(name, prompt, sampling)
        answers.append(cluster.run())
        assert cluster.failures == {}
        cluster.assert_all_blocks_free()
    assert answers[0] == answers[1]
    assert len(set(answers[0]["long"])) > 1


def test_where_auto_keeps_them(packed: Path) -> None:
    assert not is_kept(load(packed, "auto")), "no kernels on a CPU"
    with mock.patch("workers.models.expert_weights.kernels_read_mxfp4", return_value=True):
        kept = {phase: is_kept(load(packed, "auto", phase=phase)) for phase in (Phase.PREFILL, Phase.DECODE, None)}
    assert kept == {Phase.PREFILL: False, Phase.DECODE: True, None: True}


def test_a_share_that_cuts_a_block_becomes_plain(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pack(tiny_checkpoint("gpt_oss"), tmp_path)
    model = load(folder, "mxfp4", 1, 4)
    assert not is_kept(model)
    assert "inputs 24 to 48 of model.layers.0.mlp.experts.down_proj_blocks are not whole MXFP4 blocks" in caplog.text
    assert model.identity == load(folder, "dequantized", 1, 4).identity


def test_a_checkpoint_may_hold_plain_experts_whatever_its_config_says(
    packed: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    plain = tiny_checkpoint("gpt_oss", intermediate_size=128)
    with pytest.raises(ConfigError, match="holds no experts in MXFP4"):
        load(plain, "mxfp4")
    (packed / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with mock.patch("workers.models.expert_weights.kernels_read_mxfp4", return_value=True):
        assert not is_kept(load(packed, "auto"))
    with pytest.raises(ConfigError, match="'fp4' is none of auto, mxfp4, dequantized"):
        load(packed, "fp4")
