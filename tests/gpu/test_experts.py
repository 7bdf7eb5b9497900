"""Whole mixtures of experts on a GPU: routers of all kinds, few tokens and many, by every way, against float64."""

from __future__ import annotations

import pytest
import torch

from workers.layers.activation import SILU, GatedActivation
from workers.layers.moe.block import MoEBlock, Router
from workers.layers.moe.experts import Experts
from workers.layers.moe.grouped_linear import grouped_linear, usable_ways
from workers.layers.moe.token_groups import group_tokens, sort_pairs
from workers.ops.grouped_tiles import GroupedTile
from workers.ops.router_config import RouterConfig
from workers.ops.weighted_sum import weighted_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

H, I = 256, 192  # noqa: E741
KINDS = {
    "deepseek-v2-lite": (RouterConfig(64, 6), {"num_shared": 2, "in_float32": True}),
    "deepseek-v3": (
        RouterConfig(64, 4, "sigmoid", True, 2.5, 8, 4, "sum_of_two"),
        {"num_shared": 1, "in_float32": True, "corrected": True},
    ),
    "qwen2-moe": (RouterConfig(60, 4), {"num_shared": 4, "shared_gate": True}),
    "qwen3-moe": (RouterConfig(128, 8, renormalize=True), {}),
    "gpt-oss": (RouterConfig(32, 4, "softmax_of_chosen"), {"bias": True}),
    "llama4": (RouterConfig(16, 1, "sigmoid", weighs_input=True), {"num_shared": 1}),
}
TOKENS = (1, 2, 16, 64, 300, 3000)


def make(kind: str) -> MoEBlock:
    config, options = KINDS[kind]
    device, dtype, num_shared = torch.device("cuda"), torch.bfloat16, options.get("num_shared", 0)
    router = Router(config, H, dtype, device, **options)
    activation = GatedActivation("clamped_swiglu") if kind == "gpt-oss" else SILU
    num_experts, bias = config.num_experts + num_shared, options.get("bias", False)
    experts = Experts(num_experts, H, I, activation, dtype, device, bias=bias, num_shared=num_shared)
    torch.manual_seed(1)
    for parameter in (*router.parameters(), *experts.parameters()):
        parameter.normal_(0.0, 0.1)
    experts.process_weights()
    return MoEBlock(router, experts)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def exact(block: MoEBlock, x: torch.Tensor) -> torch.Tensor:
    """(T, H) float64, of the experts that the router chooses."""
    ids, weights = block.router(x)
    first, second, x = block.experts.gate_up_proj, block.experts.down_proj, x.double()
    result = torch.zeros_like(x)
    for expert in range(block.experts.num_experts):
        token, place = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, place, None].double()
        rows = x[token] * weight if block.router.config.weighs_input else x[token]
        inner = rows @ first.weight[expert].double().t()
        inner = inner if first.bias is None else inner + first.bias[expert].double()
        gate, up = inner.chunk(2, dim=-1)
        if block.experts.activation.kind == "clamped_swiglu":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
            gate = gate * torch.sigmoid(1.702 * gate)
        else:
            gate = gate * torch.sigmoid(gate)
        outer = (gate * up) @ second.weight[expert].double().t()
        outer = outer if second.bias is None else outer + second.bias[expert].double()
        result.index_add_(0, token, outer if block.router.config.weighs_input else outer * weight)
    return result


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_that_of_float64(kind: str) -> None:
    block = make(kind)
    for num_tokens in TOKENS:
        x = randn(num_tokens, H, seed=num_tokens)
        found = block(x)
        assert torch.equal(block(x), found), "twice the same, bit for bit"
        assert deviation(found, exact(block, x)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_follows_any_routing(kind: str) -> None:
    """In a chain of blocks, whose kernels start while those before still run."""
    blocks = [make(kind) for _ in range(3)]
    for num_tokens in (1, 16, 200):
        x = randn(num_tokens, H)

        def run(x: torch.Tensor = x) -> torch.Tensor:
            for block in blocks:
                x = x + block(x)
            return x

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for seed in range(5):
            x.copy_(randn(num_tokens, H, seed=seed))
            graph.replay()
            assert torch.equal(out, run(x))


@pytest.mark.parametrize(("num_experts", "top_k"), [(66, 8), (128, 8), (32, 4), (5, 1), (300, 10)])
@pytest.mark.parametrize("num_tokens", [1000, 8192, 70001])
def test_many_pairs_are_sorted_as_torch_does(num_experts: int, top_k: int, num_tokens: int) -> None:
    """By a kernel that has them shared out among programs, in runs of one block and of several."""
    from workers.ops.triton.token_groups import launch_tile_map

    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens))
    scores[:, 0] += 0.5
    ids = scores.topk(top_k).indices.cuda()
    groups, (pairs, offsets) = group_tokens(ids, num_experts), sort_pairs(ids, num_experts)
    for rows in (128, 64):
        tiles = groups.tiles(rows)
        assert torch.equal(groups.pairs, pairs)
        assert torch.equal(groups.offsets, offsets)
        wanted = launch_tile_map(offsets, ids.numel(), rows)
        assert torch.equal(tiles[0], wanted[0])
        assert torch.equal(tiles[:, tiles[0] < num_experts], wanted[:, tiles[0] < num_experts])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [66, 128])
@pytest.mark.parametrize("num_tokens", [64, 65, 256, 1024, 1025])
def test_logits_are_float32_sums_of_exact_products(
    num_tokens: int, num_experts: int, weight_dtype: torch.dtype
) -> None:
    """By the kernels for few tokens, for more and for many."""
    router = Router(
        RouterConfig(num_experts, 2),
        2048,
        torch.bfloat16,
        torch.device("cuda"),
        in_float32=weight_dtype == torch.float32,
    )
    router.weight.copy_(torch.randn(num_experts, 2048, generator=torch.Generator().manual_seed(2)))
    x, weight = randn(num_tokens, 2048), router.weight.double()
    found = router.logits(x)
    assert found.dtype == torch.float32
    allowed = 4e-6 * (x.double().abs() @ weight.abs().t())
    assert ((found.double() - x.double() @ weight.t()).abs() <= allowed).all()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="a kernel for Hopper"
)
@pytest.mark.parametrize("kind", ["deepseek-v2-lite", "gpt-oss"])
@pytest.mark.parametrize("num_tokens", [1, 300, 3000, 9000])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (GroupedTile(128, 128, 64, 8, 4, 8, "tma_rows"), GroupedTile(128, 256, 64, 8, 4, 8, "tma_rows")),
        (GroupedTile(64, 128, 64, 8, 2, 4, "tma_rows", copied=True), GroupedTile(64, 256, 64, 8, 2, 4, "tma_rows")),
    ],
)
def test_tiles_that_tma_reads(kind: str, num_tokens: int, first: GroupedTile, second: GroupedTile) -> None:
    """Replayed as a graph with other tokens, too: many more tiles than programs, and fewer."""
    block = make(kind)
    experts, x = block.experts, randn(num_tokens, H, seed=3)
    gate_up, down = experts.gate_up_proj.all_experts(), experts.down_proj.all_experts()

    def run() -> torch.Tensor:
        ids, weights = block.router(x)
        groups = group_tokens(ids, experts.num_experts)
        inner = grouped_linear(x, gate_up, groups, rows="tokens", activation=experts.activation, tile=first)
        outer = grouped_linear(inner, down, groups, out_rows="pairs", tile=second)
        return weighted_sum(outer, ids.shape[1], weights)

    assert deviation(run(), exact(block, x)) < 0.01
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.copy_(randn(num_tokens, H, seed=4))
    graph.replay()
    assert deviation(out, exact(block, x)) < 0.01


@pytest.mark.parametrize("kind", ["deepseek-v2-lite", "gpt-oss"])
@pytest.mark.parametrize("num_tokens", [2, 64, 3000])
def test_ways_agree(kind: str, num_tokens: int) -> None:
    block, x = make(kind), randn(num_tokens, H)
    experts, (ids, weights) = block.experts, block.router(x)
    groups, expected = group_tokens(ids, experts.num_experts), exact(block, x)
    gate_up, down = experts.gate_up_proj.all_experts(), experts.down_proj.all_experts()
    for way in usable_ways(gate_up):
        inner = grouped_linear(x, gate_up, groups, rows="tokens", activation=experts.activation, way=way)
        outer = grouped_linear(inner, down, groups, out_rows="pairs", way=way)
        assert deviation(weighted_sum(outer, ids.shape[1], weights), expected) < 0.01, way
