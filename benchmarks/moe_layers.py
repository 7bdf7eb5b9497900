"""The mixtures of experts that `benchmarks.moe` measures, and the tiles that it tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from workers.layers.activation import SILU, GatedActivation
from workers.layers.moe.block import MoEBlock, Router
from workers.layers.moe.chosen_experts_sum import chosen_experts_sum
from workers.layers.moe.experts import Experts
from workers.layers.moe.grouped_linear import grouped_linear
from workers.layers.moe.token_groups import group_tokens
from workers.layers.moe.ways import Way
from workers.ops.grouped_tiles import GroupedTile, staged_bytes
from workers.ops.router_config import RouterConfig
from workers.ops.sum_tiles import SumTile
from workers.ops.weighted_sum import weighted_sum


@dataclass(frozen=True)
class MoELayerShape:
    """A layer of a published model.

    Attributes:
        router: how experts are chosen.
        hidden_size: H.
        intermediate_size: I of an expert.
        num_shared: S experts that every token goes to.
        activation: between the products.
        bias: whether router and experts have biases.
        router_in_float32: whether the router's weight is float32.
    """

    router: RouterConfig
    hidden_size: int
    intermediate_size: int
    num_shared: int = 0
    activation: GatedActivation = SILU
    bias: bool = False
    router_in_float32: bool = False

    @property
    def num_experts(self) -> int:
        """E + S."""
        return self.router.num_experts + self.num_shared

    @property
    def top_k(self) -> int:
        """Experts that a token goes to, k + S."""
        return self.router.top_k + self.num_shared

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights in bfloat16."""
        return 6 * self.hidden_size * self.intermediate_size

    @property
    def token_flops(self) -> int:
        """Operations of one token in its experts."""
        return 6 * self.hidden_size * self.intermediate_size * self.top_k


LAYERS: Mapping[str, MoELayerShape] = {
    "deepseek-v2-lite": MoELayerShape(RouterConfig(64, 6), 2048, 1408, num_shared=2, router_in_float32=True),
    "qwen3-30b-a3b": MoELayerShape(RouterConfig(128, 8, renormalize=True), 2048, 768),
    "gpt-oss-20b": MoELayerShape(
        RouterConfig(32, 4, "softmax_of_chosen"), 2880, 2880, activation=GatedActivation("clamped_swiglu"), bias=True
    ),
}


def make_block(shape: MoELayerShape, device: torch.device, filled: bool = True) -> MoEBlock:
    """A layer with random weights in bfloat16, or with whatever lies in memory."""
    dtype = torch.bfloat16
    router = Router(
        shape.router,
        shape.hidden_size,
        dtype,
        device,
        bias=shape.bias,
        in_float32=shape.router_in_float32,
        num_shared=shape.num_shared,
    )
    experts = Experts(
        shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
        shape.activation,
        dtype,
        device,
        bias=shape.bias,
        num_shared=shape.num_shared,
    )
    block = MoEBlock(router, experts)
    if filled:
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.02)
    experts.process_weights()
    return block


def run_block(
    block: MoEBlock,
    x: torch.Tensor,
    *,
    way: Way = "triton",
    first: GroupedTile | None = None,
    second: GroupedTile | SumTile | None = None,
) -> torch.Tensor:
    """What `MoEBlock` does, with ways and tiles that are given; see `workers.layers.moe.experts.Experts`."""
    ids, weights = block.router(x)
    experts = block.experts
    groups = group_tokens(ids, experts.num_experts, experts.num_shared)
    order: Literal["pairs", "sorted"] = "pairs" if x.shape[0] == 1 and way == "triton" else "sorted"
    gate_up, down = experts.gate_up_proj.all_experts(), experts.down_proj.all_experts()
    inner = grouped_linear(
        x, gate_up, groups, rows="tokens", out_rows=order, activation=experts.activation, way=way, tile=first
    )
    if isinstance(second, SumTile):
        return chosen_experts_sum(inner, down, ids, weights, tile=second)
    outer = grouped_linear(inner, down, groups, rows=order, out_rows="pairs", routed_before=True, way=way, tile=second)
    return weighted_sum(outer, groups.top_k, weights)


def _few(rows: int, outputs: int, inputs: int, stages: int, warps: int = 4, prefetched: int = 512) -> GroupedTile:
    return GroupedTile(rows, outputs, inputs, 1 if rows == 16 else 4, stages, warps, "few_rows", prefetched)


def _many(rows: int, outputs: int, inputs: int, stages: int, warps: int) -> GroupedTile:
    return GroupedTile(rows, outputs, inputs, 8, stages, warps)


def _tma(rows: int, outputs: int, stages: int, warps: int = 8, copied: bool = False) -> GroupedTile:
    return GroupedTile(rows, outputs, 64, 8, stages, warps, "tma_rows", copied=copied)


_FIRST: Mapping[int, Sequence[GroupedTile]] = {
    16: (
        _few(16, 64, 128, 3),
        _few(16, 64, 64, 4),
        _few(16, 64, 64, 6),
        _few(16, 32, 128, 4),
        _few(16, 32, 128, 6),
        _few(16, 32, 256, 4),
    ),
    32: (_few(32, 64, 64, 4), _few(32, 128, 64, 3, 8)),
    64: (
        _few(64, 64, 64, 4),
        _tma(64, 128, 2, 4),
        _tma(64, 128, 2, 4, copied=True),
        _tma(64, 128, 4, 4),
    ),
    128: (
        _few(128, 128, 64, 3, 8),
        _many(128, 128, 64, 3, 8),
        _tma(128, 128, 3),
        _tma(128, 128, 4),
        _tma(128, 128, 3, copied=True),
        _tma(128, 128, 4, copied=True),
    ),
}
_SECOND: Mapping[int, Sequence[GroupedTile]] = {
    16: (
        _few(16, 64, 128, 4),
        _few(16, 64, 128, 6),
        _few(16, 64, 64, 8),
        _few(16, 32, 128, 6),
        _few(16, 128, 64, 4),
        _few(16, 64, 128, 4, prefetched=0),
    ),
    32: (_few(32, 64, 128, 4), _few(32, 128, 64, 4)),
    64: (
        _few(64, 128, 64, 4),
        _many(64, 128, 64, 4, 4),
        _tma(64, 256, 2, 4),
        _tma(64, 128, 3, 4),
    ),
    128: (
        _many(128, 256, 64, 3, 8),
        _many(128, 128, 64, 3, 8),
        _many(128, 128, 64, 4, 8),
        _tma(128, 256, 3),
        _tma(128, 256, 4),
        _tma(128, 128, 4),
    ),
}
"""By the rows of a tile: of the first product, and of the second."""

SUMS: Sequence[SumTile] = tuple(
    SumTile(outputs, inputs, stages, warps, prefetched)
    for outputs, inputs, stages, warps, prefetched in (
        (16, 512, 5, 8, 64),
        (16, 512, 5, 8, 0),
        (16, 256, 8, 4, 64),
        (8, 512, 6, 4, 64),
        (8, 512, 8, 8, 64),
        (16, 1024, 4, 8, 64),
    )
)
"""For a single token."""


def candidates(shape: MoELayerShape, num_tokens: int) -> list[tuple[Sequence[GroupedTile], Sequence[GroupedTile]]]:
    """Tiles to try, of the first product and of the second, that have rows in common."""
    mean = num_tokens * shape.top_k / shape.num_experts
    limits = {16: (0.0, 12.0), 32: (4.0, 48.0), 64: (16.0, 600.0), 128: (48.0, float("inf"))}
    return [(_FIRST[rows], _SECOND[rows]) for rows, (begin, end) in limits.items() if begin <= mean < end]


def all_tiles(shape: MoELayerShape, tokens: Sequence[int]) -> list[tuple[GroupedTile, GroupedTile]]:
    """Pairs that have every tile that is tried for these numbers of tokens in one of them at least."""
    pairs: dict[tuple[GroupedTile, GroupedTile], None] = {}
    for num_tokens in tokens:
        for first, second in candidates(shape, num_tokens):
            for i in range(max(len(first), len(second))):
                pairs[first[i % len(first)], second[i % len(second)]] = None
    return list(pairs)


def describe(tile: GroupedTile | SumTile | None) -> str:
    """A tile in one word."""
    if tile is None:
        return "-"
    depth = f"s{tile.num_stages}w{tile.num_warps}"
    ahead = f"p{tile.prefetched}" if tile.prefetched else ""
    copied = "c" if isinstance(tile, GroupedTile) and tile.copied else ""
    if isinstance(tile, SumTile):
        return f"sum-{tile.outputs}x{tile.inputs}{depth}{ahead}"
    return f"{tile.kernel.removesuffix('_rows')}-{tile.rows}x{tile.outputs}x{tile.inputs}{depth}{ahead}{copied}"


def fitting(tile: GroupedTile, gated: bool, shared_memory: int) -> GroupedTile | None:
    """The tile, or None where its stages do not fit the shared memory."""
    needed = staged_bytes(tile, gated, torch.bfloat16, tile.num_stages)
    return tile if needed <= shared_memory else None
