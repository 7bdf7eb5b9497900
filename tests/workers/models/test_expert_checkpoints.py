"""Experts out of checkpoints that `transformers` saved compute what its own do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.layers.activation import GatedActivation
from workers.layers.moe.experts import Experts
from workers.loading.checkpoint import stored_tensors
from workers.loading.expert_weights import ExpertSizes, expert_by_expert, interleaved, stacked
from workers.loading.placements import placement
from workers.loading.weight_stream import load_tensors
from workers.loading.weight_target import WeightTarget, of_layer
from workers.ops.weighted_sum import summed

E, K, H, I = 4, 2, 32, 48  # noqa: E741
CPU = torch.device("cpu")
COMMON = {
    "hidden_size": H,
    "intermediate_size": I,
    "moe_intermediate_size": I,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 32,
    "num_experts_per_tok": K,
    "initializer_range": 0.3,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": E, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, **LATENT}

Targets = Callable[[ExpertSizes], dict[str, WeightTarget]]
SILU = GatedActivation("silu")
FAMILIES: dict[str, tuple[dict[str, Any], Targets, GatedActivation]] = {
    "mixtral": (
        {"num_local_experts": E},
        lambda sizes: expert_by_expert(sizes, "block_sparse_moe.experts", ("w1", "w3", "w2")),
        SILU,
    ),
    "qwen2_moe": ({"num_experts": E}, expert_by_expert, SILU),
    "qwen3_moe": ({"num_experts": E}, expert_by_expert, SILU),
    "deepseek_v2": (DEEPSEEK, expert_by_expert, SILU),
    "deepseek_v3": (DEEPSEEK, expert_by_expert, SILU),
    "gpt_oss": ({"num_local_experts": E}, interleaved, GatedActivation("clamped_swiglu")),
    "llama4_text": (
        {"num_local_experts": E, "interleave_moe_layer_step": 1, "intermediate_size_mlp": I},
        lambda sizes: stacked(sizes, "feed_forward.experts"),
        SILU,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_saved_checkpoint(tmp_path: Path, family: str) -> None:
    settings, targets, activation = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **COMMON, **settings), experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    found = {stored.name: stored for stored in stored_tensors(tmp_path)}
    layer = model.model.layers[0]
    theirs = (layer.feed_forward if family == "llama4_text" else layer.mlp).experts

    x = torch.randn(11, H)
    ids = torch.randn(11, E).topk(K).indices
    weights = torch.rand(11, K)
    with torch.no_grad():
        if family == "llama4_text":  # its experts compute every token with every expert
            everything = theirs(x.repeat(E, 1)).view(E, 11, H).transpose(0, 1)
            expected = (everything.gather(1, ids[..., None].expand(-1, -1, H)) * weights[..., None]).sum(dim=1)
        else:
            expected = theirs(x, ids, weights)
    for size in (1, 3):
        parts = [
            summed(
                _experts(ExpertSizes(E, H, I, rank, size), targets, activation, found, family).summands(x, ids, weights)
            )
            for rank in range(size)
        ]
        torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-5)


def _experts(
    sizes: ExpertSizes, targets: Targets, activation: GatedActivation, found: dict[str, Any], family: str
) -> Experts:
    bias = family == "gpt_oss"
    experts = Experts(E, H, sizes.share, activation, torch.float32, CPU, bias=bias, rank=sizes.rank)
    parameters = {f"layers.0.mlp.experts.{name}": parameter for name, parameter in experts.named_parameters()}
    prefix, placed = "model.layers.0.", []
    for name, target in targets(sizes).items():
        placed.append(placement(prefix + name, of_layer(target, prefix, "layers.0."), found, parameters))
    load_tensors(placed, CPU)
    experts_in_file = {name for name in found if ".experts." in name}
    assert experts_in_file == {prefix + name for name in targets(sizes)}, "every tensor has a place"
    return experts
