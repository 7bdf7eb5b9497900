"""Which experts tokens go to, against the routers of `transformers`."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from workers.errors import ConfigError
from workers.layers.moe.block import Router
from workers.layers.moe.routing import route, route_torch
from workers.ops.router_config import RouterConfig

H = 32
V3 = {"n_routed_experts": 32, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5}
V3_ROUTER = RouterConfig(32, 6, "sigmoid", True, 2.5, num_groups=8, top_k_groups=3, group_score="sum_of_two")
V2 = {"n_routed_experts": 32, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
ROUTERS: dict[str, tuple[Any, Any, RouterConfig]] = {
    "mixtral": (
        MixtralTopKRouter,
        MixtralConfig(hidden_size=H, num_local_experts=8, num_experts_per_tok=2),
        RouterConfig(8, 2, renormalize=True),
    ),
    "qwen2-moe": (
        Qwen2MoeTopKRouter,
        Qwen2MoeConfig(hidden_size=H, num_experts=60, num_experts_per_tok=4, norm_topk_prob=False),
        RouterConfig(60, 4),
    ),
    "qwen3-moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(hidden_size=H, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
        RouterConfig(128, 8, renormalize=True),
    ),
    "gpt-oss": (
        GptOssTopKRouter,
        GptOssConfig(hidden_size=H, num_local_experts=32, num_experts_per_tok=4),
        RouterConfig(32, 4, "softmax_of_chosen"),
    ),
    "deepseek-v2 greedy": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(hidden_size=H, topk_method="greedy", **V2),
        RouterConfig(32, 6, scaling_factor=16.0),
    ),
    "deepseek-v2 groups": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(hidden_size=H, topk_method="group_limited_greedy", n_group=8, topk_group=3, **V2),
        RouterConfig(32, 6, scaling_factor=16.0, num_groups=8, top_k_groups=3),
    ),
    "deepseek-v3": (DeepseekV3TopkRouter, DeepseekV3Config(hidden_size=H, norm_topk_prob=True, **V3), V3_ROUTER),
    "deepseek-v3 one group": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(hidden_size=H, norm_topk_prob=False, **{**V3, "n_group": 1, "topk_group": 1}),
        RouterConfig(32, 6, "sigmoid", False, 2.5, group_score="sum_of_two"),
    ),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs_and_ours(name: str) -> tuple[nn.Module, Router]:
    module, hf_config, config = ROUTERS[name]
    theirs, seed = module(hf_config), 1
    ours = Router(
        config,
        H,
        torch.float32,
        torch.device("cpu"),
        bias="gpt-oss" in name,
        corrected="v3" in name,
        in_float32="deepseek" in name,
    )
    for key, parameter in ours.named_parameters():
        parameter.copy_(randn(*parameter.shape, seed=(seed := seed + 1)))
        getattr(theirs, key).data.copy_(parameter)
    return theirs, ours


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_experts_and_weights_are_those_of_transformers(name: str, num_tokens: int) -> None:
    theirs, ours = theirs_and_ours(name)
    x = randn(num_tokens, H, seed=9)
    with torch.no_grad():
        _, their_weights, their_ids = theirs(x)
        ids, weights = ours(x)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    order, their_order = ids.argsort(dim=-1), their_ids.argsort(dim=-1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, their_order))
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_scores_go_where_transformers_sends_them(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    for key, parameter in ours.named_parameters():
        parameter.fill_(0.25)
        getattr(theirs, key).data.fill_(0.25)
    x = randn(5, H)
    with torch.no_grad():
        assert torch.equal(ours(x)[0].sort().values, theirs(x)[2].sort().values)


def test_llama4_takes_the_sigmoid_of_the_best_logit() -> None:
    config = Llama4TextConfig(hidden_size=H, num_local_experts=16, num_experts_per_tok=1)
    router = Llama4Router(config)
    x = randn(40, H) * 30  # far enough for sigmoids that are all 1 in float32
    with torch.no_grad():
        scores, logits = router(x)
        ids, weights = route(logits, RouterConfig(16, 1, "sigmoid", weighs_input=True))
    assert torch.equal(torch.zeros_like(scores).scatter_(1, ids, weights), scores)


def test_a_correction_bias_decides_but_does_not_weigh() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 3.0, 0.0, 2.0])
    ids, weights = route(logits, RouterConfig(4, 2, "sigmoid"), bias)
    assert ids.tolist() == [[1, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_groups_close_even_to_the_best_expert_outside() -> None:
    # Of V3's groups the sum of two decides: 0.6 + 0.6 before 0.9 + 0.1, although 0.9 is the best expert.
    logits = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    best = RouterConfig(4, 2, "sigmoid", num_groups=2, top_k_groups=1, group_score="max")
    two = RouterConfig(4, 2, "sigmoid", num_groups=2, top_k_groups=1, group_score="sum_of_two")
    assert sorted(route(logits, best)[0][0].tolist()) == [0, 1]
    assert sorted(route(logits, two)[0][0].tolist()) == [2, 3]


@pytest.mark.parametrize("scores", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_a_tokens_experts_do_not_depend_on_the_batch(scores: Any) -> None:
    logits = randn(50, 16).bfloat16()
    config = RouterConfig(16, 3, scores, renormalize=True)
    ids, weights = route(logits, config)
    for i in range(0, 50, 7):
        alone = route(logits[i : i + 1], config)
        assert torch.equal(alone[0][0], ids[i])
        assert torch.equal(alone[1][0], weights[i])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "5 experts for each token of 4"),
        ({"num_experts": 4, "top_k": 0}, "0 experts for each token of 4"),
        ({"num_experts": 6, "top_k": 2, "num_groups": 4}, "6 experts do not form 4 equal groups"),
        ({"num_experts": 8, "top_k": 2, "num_groups": 4, "top_k_groups": 5}, "5 groups for each token of 4"),
        ({"num_experts": 8, "top_k": 3, "num_groups": 4, "top_k_groups": 1}, "3 experts .* out of 1 groups of 2"),
        ({"num_experts": 4, "top_k": 1, "num_groups": 4, "group_score": "sum_of_two"}, "no two best experts"),
        ({"num_experts": 4, "top_k": 1, "num_groups": 2, "scores": "softmax_of_chosen"}, "knows no groups"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**arguments)


def test_logits_and_biases_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 5\) for 4 experts"):
        route(torch.zeros(2, 5), RouterConfig(4, 1))
    with pytest.raises(ValueError, match=r"correction bias of shape \(3,\) for 4 experts"):
        route(torch.zeros(2, 4), RouterConfig(4, 1, "sigmoid"), torch.zeros(3))
    with pytest.raises(ValueError, match="belongs to sigmoid scores, not to softmax"):
        route(torch.zeros(2, 4), RouterConfig(4, 1), torch.zeros(4))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = {"num_groups": 8, "top_k_groups": 3}
KINDS: dict[str, tuple[RouterConfig, bool, int, bool]] = {
    # what is chosen how; whether a correction bias decides; shared experts; whether these have a gate
    "mixtral": (RouterConfig(8, 2, renormalize=True), False, 0, False),
    "qwen2-moe": (RouterConfig(60, 4), False, 4, True),
    "gpt-oss": (RouterConfig(32, 4, "softmax_of_chosen"), False, 0, False),
    "llama4": (RouterConfig(16, 1, "sigmoid", weighs_input=True), False, 1, False),
    "deepseek-v2": (RouterConfig(160, 6, scaling_factor=16.0, **GROUPS), False, 2, False),
    "deepseek-v2-lite": (RouterConfig(64, 6), False, 2, False),
    "deepseek-v3": (RouterConfig(256, 8, "sigmoid", True, 2.5, 8, 4, "sum_of_two"), True, 1, False),
    "sum of two without a correction": (RouterConfig(24, 6, "sigmoid", False, 1.0, **GROUPS), False, 0, False),
    "all experts": (RouterConfig(5, 5, "sigmoid", True), True, 0, False),
}


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The launch functions, of kernels that the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.ops.triton import router_logits, routing
    for function in (language.sum, routing.route_kernel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return SimpleNamespace(route=routing.launch_route, logits=router_logits)


def by_kernel(
    kernels: SimpleNamespace, logits: torch.Tensor, config: RouterConfig, bias: torch.Tensor | None, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    size = logits.shape[0], config.top_k + num_shared
    ids = torch.full(size, -1, dtype=torch.int64, device=DEVICE)
    weights = torch.full(size, float("nan"), device=DEVICE)
    kernels.route(ids, weights, logits, config, bias, num_shared)
    return ids, weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_chooses_and_weighs_as_torch_does(kernels: SimpleNamespace, kind: str) -> None:
    config, corrected, num_shared, gated = KINDS[kind]
    # No two logits of a token are the same, in bfloat16 neither: torch does not say which of these it takes.
    dtype = torch.bfloat16 if config.num_groups == 1 else torch.float32
    order = torch.rand(3, config.num_experts + gated, generator=torch.Generator().manual_seed(1)).argsort(dim=-1)
    logits = ((order - config.num_experts / 2) / 32).to(dtype).to(DEVICE)
    bias = randn(config.num_experts, seed=2).to(DEVICE) if corrected else None
    ids, weights = by_kernel(kernels, logits, config, bias, num_shared)
    exact_ids, exact_weights = route_torch(logits, config, bias, num_shared)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(weights, exact_weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_weights_are_those_of_float64(kernels: SimpleNamespace, kind: str) -> None:
    config, corrected, num_shared, gated = KINDS[kind]
    logits = (randn(2, config.num_experts + gated, seed=3) * 3).to(DEVICE)
    bias = randn(config.num_experts, seed=2).to(DEVICE) if corrected else None
    ids, weights = by_kernel(kernels, logits, config, bias, num_shared)
    routed, exact = logits[:, : config.num_experts].double(), torch.ones_like(weights, dtype=torch.float64)
    own = ids[:, num_shared:] - num_shared
    chosen = routed.gather(1, own)
    if config.scores == "softmax":
        chosen = routed.softmax(dim=-1).gather(1, own)
    else:
        chosen = chosen.softmax(dim=-1) if config.scores == "softmax_of_chosen" else chosen.sigmoid()
    chosen = chosen / chosen.sum(dim=-1, keepdim=True) if config.renormalize else chosen
    exact[:, num_shared:] = chosen * config.scaling_factor
    if gated:
        exact[:, :num_shared] = logits[:, -1:].double().sigmoid()
    torch.testing.assert_close(weights.double(), exact, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, float("-inf"), float("nan")])
def test_of_equal_scores_the_kernel_takes_the_smaller_numbers(
    kernels: SimpleNamespace, kind: str, value: float
) -> None:
    """Whatever they are: no expert twice, none that does not exist."""
    config, _, num_shared, gated = KINDS[kind]
    logits = torch.full((2, config.num_experts + gated), value, device=DEVICE)
    logits[1, 1::2] = -value if value == 0.0 else value
    ids = by_kernel(kernels, logits, config, None, num_shared)[0]
    assert ids.tolist() == [list(range(num_shared + config.top_k))] * 2


def test_a_single_logit_that_is_not_a_number_leaves_the_others_in_order(kernels: SimpleNamespace) -> None:
    logits = torch.tensor([[1.0, float("nan"), 3.0, 2.0, -1.0]], device=DEVICE)
    ids = by_kernel(kernels, logits, RouterConfig(5, 3, "softmax_of_chosen"), None)[0]
    assert ids.tolist() == [[1, 2, 3]], "as torch.topk has it"


LIMITS = [{"FEW_TOKENS": few, "PARTED_TOKENS": parted} for few, parted in ((1 << 20, 0), (0, 1 << 20), (0, 0))]
"""With which each of the kernels computes whatever is asked for."""


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "size", "with_bias"),
    [(1, 64, 96, False), (5, 7, 40, True), (18, 17, 300, False)],
)
def test_router_logits(
    kernels: SimpleNamespace,
    weight_dtype: torch.dtype,
    num_tokens: int,
    num_experts: int,
    size: int,
    with_bias: bool,
) -> None:
    """Float32 sums of exact products: a float32 weight loses nothing."""
    x = randn(num_tokens, 2 * size).bfloat16().to(DEVICE)[:, :size]
    weight = randn(num_experts, size, seed=1).to(weight_dtype).to(DEVICE)
    bias = randn(num_experts, seed=2).to(weight_dtype).to(DEVICE) if with_bias else None
    assert kernels.logits.computes(x, weight)
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().t()
    for limits in LIMITS:
        logits = torch.full((num_tokens, num_experts), float("nan"), device=DEVICE)
        with mock.patch.multiple(kernels.logits, **limits):
            kernels.logits.launch_router_logits(logits, x, weight, bias)
        assert ((logits.double() - exact).abs() <= 2e-6 * scale + 1e-6).all()


@pytest.mark.parametrize("limits", LIMITS, ids=["few", "parted", "many"])
def test_a_tokens_logits_do_not_depend_on_the_batch(kernels: SimpleNamespace, limits: dict[str, int]) -> None:
    x, weight = randn(5, 64).bfloat16().to(DEVICE), randn(6, 64, seed=1).to(DEVICE)
    together, alone = (torch.empty(n, 6, device=DEVICE) for n in (5, 1))
    with mock.patch.multiple(kernels.logits, **limits):
        kernels.logits.launch_router_logits(together, x, weight, None)
        for i in range(5):
            kernels.logits.launch_router_logits(alone, x[i : i + 1], weight, None)
            assert torch.equal(alone[0], together[i])


def test_shared_experts_come_first() -> None:
    logits, config = randn(4, 6), RouterConfig(6, 2, scaling_factor=3.0)
    ids, weights = route(logits, config)
    with_shared, their_weights = route(logits, config, num_shared=2)
    assert torch.equal(with_shared[:, 2:], ids + 2)
    assert with_shared[:, :2].tolist() == [[0, 1]] * 4
    assert torch.equal(their_weights, torch.cat([torch.ones(4, 2), weights], dim=1)), "they are not scaled"
    gate = randn(4, 1, seed=5)
    gated = route(torch.cat([logits, gate], dim=1), config, num_shared=2)[1]
    torch.testing.assert_close(gated, torch.cat([gate.sigmoid().expand(-1, 2), weights], dim=1))


def test_a_gate_belongs_to_shared_experts() -> None:
    with pytest.raises(ConfigError, match="gate of 0 shared experts"):
        Router(RouterConfig(4, 1), H, torch.float32, torch.device("cpu"), shared_gate=True)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 5\) for 4 experts"):
        route(torch.zeros(1, 5), RouterConfig(4, 1))
