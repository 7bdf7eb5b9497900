"""The whole MLP of a layer against the modules of `transformers`, with the same random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from workers.layers.activation import GatedActivation
from workers.layers.moe.block import MoEBlock, Router, SharedExpert
from workers.layers.moe.experts import Experts
from workers.layers.moe.grouped_weight import GroupedWeight
from workers.ops.router_config import RouterConfig
from workers.ops.weighted_sum import summed

H, I = 32, 24  # noqa: E741
CPU = torch.device("cpu")
COMMON = {"hidden_size": H, "num_attention_heads": 2, "intermediate_size": I, "moe_intermediate_size": I}
DEEPSEEK = {**COMMON, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2}
SILU = GatedActivation("silu")

FAMILIES: dict[str, tuple[Any, Any, RouterConfig, GatedActivation]] = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**COMMON, num_local_experts=8, num_experts_per_tok=2),
        RouterConfig(8, 2, renormalize=True),
        SILU,
    ),
    "mixtral gelu": (
        MixtralSparseMoeBlock,
        MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, hidden_act="gelu"),
        RouterConfig(4, 2, renormalize=True),
        GatedActivation.named("gelu"),
    ),
    "mixtral gelu_pytorch_tanh": (
        MixtralSparseMoeBlock,
        MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, hidden_act="gelu_pytorch_tanh"),
        RouterConfig(4, 2, renormalize=True),
        GatedActivation.named("gelu_pytorch_tanh"),
    ),
    "qwen2-moe": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(**COMMON, num_experts=12, num_experts_per_tok=4, shared_expert_intermediate_size=40),
        RouterConfig(12, 4),
        SILU,
    ),
    "qwen3-moe": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(**COMMON, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True),
        RouterConfig(64, 8, renormalize=True),
        SILU,
    ),
    "gpt-oss": (
        GptOssMLP,
        GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=8, num_experts_per_tok=4),
        RouterConfig(8, 4, "softmax_of_chosen"),
        GatedActivation("clamped_swiglu", 1.702, 7.0),
    ),
    "llama4": (
        Llama4TextMoe,
        Llama4TextConfig(**COMMON, num_local_experts=8, num_experts_per_tok=1),
        RouterConfig(8, 1, "sigmoid", weighs_input=True),
        SILU,
    ),
    "llama4 two experts": (
        Llama4TextMoe,
        Llama4TextConfig(**COMMON, num_local_experts=8, num_experts_per_tok=2),
        RouterConfig(8, 2, "sigmoid", weighs_input=True),
        SILU,
    ),
    "deepseek-v2": (
        DeepseekV2Moe,
        DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2),
        RouterConfig(16, 4, num_groups=4, top_k_groups=2),
        SILU,
    ),
    "deepseek-v3": (
        DeepseekV3MoE,
        DeepseekV3Config(**DEEPSEEK, n_group=4, topk_group=2, routed_scaling_factor=2.5),
        RouterConfig(16, 4, "sigmoid", True, 2.5, num_groups=4, top_k_groups=2, group_score="sum_of_two"),
        SILU,
    ),
}


class PlainMLP(nn.Module):
    """A rank's share of a gated MLP of `transformers`: its partial sum."""

    def __init__(self, mlp: nn.Module, rank: int, size: int) -> None:
        super().__init__()
        share = mlp.down_proj.weight.shape[1] // size
        own = slice(rank * share, (rank + 1) * share)
        gate, up, down = mlp.gate_proj.weight[own], mlp.up_proj.weight[own], mlp.down_proj.weight[:, own]
        self.gate, self.up, self.down = gate.detach(), up.detach(), down.detach()

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        return (nn.functional.silu(x @ self.gate.t()) * (x @ self.up.t())) @ self.down.t()


def theirs(family: str) -> nn.Module:
    module, config, _, _ = FAMILIES[family]
    config._experts_implementation = "eager"
    block: nn.Module = module(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.normal_(generator=generator).mul_(0.4)
    return block


def ours(family: str, block: nn.Module, rank: int = 0, size: int = 1) -> MoEBlock:
    """A rank's share of the same block."""
    _, _, config, activation = FAMILIES[family]
    gate = block.router if hasattr(block, "router") else block.gate
    router = Router(
        config,
        H,
        torch.float32,
        CPU,
        bias="gpt-oss" in family,
        corrected=hasattr(gate, "e_score_correction_bias"),
        in_float32="deepseek" in family,
    )
    for name, parameter in router.named_parameters():
        parameter.copy_(getattr(gate, name))
    share = I // size
    oss = "gpt-oss" in family
    experts = Experts(config.num_experts, H, share, activation, torch.float32, CPU, bias=oss, rank=rank)
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    if oss or "llama4" in family:
        gate_up, down = gate_up.mT, down.mT
    halves = [gate_up[:, ::2], gate_up[:, 1::2]] if oss else list(gate_up.chunk(2, dim=1))
    own = slice(rank * share, (rank + 1) * share)
    experts.gate_up_proj.weight.copy_(torch.cat([half[:, own] for half in halves], dim=1))
    experts.down_proj.weight.copy_(down[:, :, own])
    if oss:
        bias = block.experts.gate_up_proj_bias.detach()
        experts.gate_up_proj.bias.copy_(torch.cat([bias[:, ::2][:, own], bias[:, 1::2][:, own]], dim=1))
        experts.down_proj.bias.copy_(block.experts.down_proj_bias.detach())
    mlp = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    shared = None
    if mlp is not None:
        shared = SharedExpert(PlainMLP(mlp, rank, size), H, hasattr(block, "shared_expert_gate"), torch.float32, CPU)
        if shared.gate_weight is not None:
            shared.gate_weight.copy_(block.shared_expert_gate.weight)
    return MoEBlock(router, experts, shared)


def expected(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = block(x[None])
    return (result[0] if isinstance(result, tuple) else result).reshape(x.shape)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_that_of_transformers(family: str) -> None:
    block = theirs(family)
    mine = ours(family, block)
    mine.experts.process_weights()
    for num_tokens in (1, 2, 7, 64, 300):  # of few tokens most experts have none
        x = randn(num_tokens, H, seed=num_tokens)
        torch.testing.assert_close(mine(x), expected(block, x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_results_sum_to_the_whole(family: str, size: int) -> None:
    block = theirs(family)
    x = randn(37, H)
    parts = [ours(family, block, rank, size)(x) for rank in range(size)]
    torch.testing.assert_close(sum(parts), expected(block, x), rtol=1e-5, atol=2e-5)
    assert all(not torch.allclose(part, expected(block, x), atol=1e-2) for part in parts)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_all_tokens_may_go_to_the_same_experts(family: str) -> None:
    block = theirs(family)
    x = randn(1, H).expand(50, H).contiguous()
    torch.testing.assert_close(ours(family, block)(x), expected(block, x), rtol=1e-5, atol=2e-5)


def test_a_batch_may_be_empty() -> None:
    assert ours("qwen2-moe", theirs("qwen2-moe"))(torch.zeros(0, H)).shape == (0, H)


def experts_of(dtype: torch.dtype = torch.float32) -> Experts:
    experts = Experts(4, H, I, SILU, dtype, CPU)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=seed))
    return experts


def test_sums_over_a_tokens_experts_are_rounded_once() -> None:
    experts = experts_of(torch.bfloat16)
    x, ids = randn(9, H).bfloat16(), torch.tensor([[0, 1, 2, 3]] * 9)
    weights = torch.tensor([[100.0, 0.01, 0.01, -100.0]] * 9)
    one_by_one = [summed(experts.summands(x, ids[:, i : i + 1], torch.ones(9, 1))).double() for i in range(4)]
    exact = sum(weights[:, i, None].double() * rows for i, rows in enumerate(one_by_one))
    error = (summed(experts.summands(x, ids, weights)).double() - exact).abs()
    largest = max(float(rows.abs().max()) for rows in one_by_one) * 100
    assert (error <= exact.abs() * 2**-8 + largest * 2**-22).all()


class EightBitWeight(GroupedWeight):
    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        self.numbers, self.scales = numbers, scales

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.numbers.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.numbers[expert] * self.scales[expert]).t()


class EightBits:
    """Whole numbers with a scale for each row of each expert."""

    def create_weights(self, module, shape, bias, dtype, device) -> None:
        module.numbers = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), requires_grad=False)
        module.inverse_scales = nn.Parameter(torch.empty(*shape[:2], 1, device=device), requires_grad=False)

    def process_weights(self, module) -> None:
        module.scales = 1 / module.inverse_scales

    def weight(self, module, with_bias: bool) -> GroupedWeight:
        return EightBitWeight(module.numbers, module.scales)


def test_weights_may_stay_in_a_format_of_their_own() -> None:
    quantised = Experts(4, H, I, SILU, torch.float32, CPU, method=EightBits())
    plain = Experts(4, H, I, SILU, torch.float32, CPU)
    for seed, (ours, theirs) in enumerate(
        [(quantised.gate_up_proj, plain.gate_up_proj), (quantised.down_proj, plain.down_proj)]
    ):
        ours.numbers.copy_(randn(*ours.numbers.shape, seed=seed) * 40)
        ours.inverse_scales.copy_(randn(*ours.inverse_scales.shape, seed=seed + 2).exp() * 40)
        theirs.weight.copy_(ours.numbers / ours.inverse_scales)
    quantised.process_weights()
    plain.process_weights()
    x, ids, weights = randn(9, H), torch.arange(18).view(9, 2) % 4, torch.rand(9, 2)
    found, expected = (summed(experts.summands(x, ids, weights)) for experts in (quantised, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.summands(torch.zeros(3, H), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)),
            "for 3 tokens",
        ),
        (
            lambda e: e.summands(torch.zeros(2, H), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2)),
            "weights of",
        ),
        (lambda e: e.summands(torch.zeros(2, H), torch.full((2, 1), 4), torch.zeros(2, 1)), "from 4 to 4 of 4 experts"),
        (
            lambda e: e.summands(torch.zeros(2, H), torch.full((2, 1), -1), torch.zeros(2, 1)),
            "from -1 to -1 of 4 experts",
        ),
        (lambda e: e.summands(torch.zeros(2, H), torch.zeros(2, 1), torch.zeros(2, 1)), "ids of torch.float32"),
        (
            lambda e: e.summands(torch.zeros(2, H + 1), torch.zeros(2, 1).long(), torch.zeros(2, 1)),
            r"x of .* \(2, 33\)",
        ),
        (
            lambda e: e.summands(torch.zeros(2, H).half(), torch.zeros(2, 1).long(), torch.zeros(2, 1)),
            "x of torch.float16",
        ),
        (
            lambda e: summed(e.summands(torch.zeros(2, H), torch.zeros(2, 1).long(), torch.zeros(2, 1).half())),
            "needs float32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[Experts], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(experts_of())
