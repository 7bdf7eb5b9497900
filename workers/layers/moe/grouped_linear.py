"""One projection of all experts as one grouped product, by the fastest way that a device has.

The product reads its rows by way of the groups, and may write them back to where the pairs came from, so that neither
a sorted copy of the tokens nor a sorted result has to exist. On a GPU no way but the last resort waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch

from workers.layers.activation import GatedActivation
from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.layers.moe.mxfp4 import Mxfp4Weight
from workers.layers.moe.token_groups import TokenGroups
from workers.layers.moe.ways import Way, way_for
from workers.ops.grouped_tiles import GroupedTile, without_tma
from workers.ops.mxfp4_tiles import Mxfp4Tile, in_bfloat16

Rows = Literal["tokens", "pairs", "sorted"]
"""What row n of an operand belongs to: token n, pair number n, or the n-th pair in the order of the experts."""


def grouped_linear(
    x: torch.Tensor,
    weight: GroupedWeight,
    groups: TokenGroups,
    *,
    rows: Rows = "sorted",
    out_rows: Literal["pairs", "sorted"] = "sorted",
    activation: GatedActivation | None = None,
    routed_before: bool = False,
    way: Way | None = None,
    tile: GroupedTile | Mxfp4Tile | None = None,
) -> torch.Tensor:
    """`x[pair] @ weight[expert of the pair].T + bias[expert of the pair]` for every pair.

    Args:
        x: (T, K) or (N, K), as `rows` says, of the weight's dtype; the elements of a row contiguous.
        weight: (E, M, K) of all experts; with an activation gate above up.
        groups: the N pairs.
        rows: what the rows of x belong to.
        out_rows: what the rows of the result belong to.
        activation: applied to each row of the product: M becomes M / 2.
        routed_before: whether the groups were made before the kernel that made x: a kernel may then ask for weights
            while that one still runs.
        way: how to compute it; None: as the table of this device says.
        tile: of the kernel, where that is the way; None: as the table of this device says. Of a weight in MXFP4 a
            `GroupedTile` means that its numbers are multiplied in bfloat16.

    Returns:
        (N, M) of x's dtype.

    Raises:
        ValueError: arguments that do not fit each other, or a way that cannot compute them.
    """
    _check(x, weight, groups, rows, activation)
    if way is None:
        way = way_for(groups.num_tokens, usable_ways(weight), x.device)
    elif way not in usable_ways(weight):
        raise ValueError(f"a grouped product of {weight} on {weight.device.type} cannot be computed by {way}")
    if way == "triton":
        return _triton(x, weight, groups, rows, out_rows, activation, routed_before, tile)
    if way == "torch":
        return _spread(_activated(_torch(_gathered(x, groups, rows), weight, groups), activation), groups, out_rows)
    return _loop(x, weight, groups, rows, out_rows, activation)


def usable_ways(weight: GroupedWeight) -> tuple[Way, ...]:
    """The ways that can multiply with this weight where it is; `loop` always can."""
    ways: list[Way] = []
    if isinstance(weight, Mxfp4Weight):
        return ("triton", "loop") if weight.has_kernels else ("loop",)
    if isinstance(weight, PlainWeight) and weight.device.type == "cuda":
        ways.append("triton")
        if _has_grouped_mm(weight.device) and weight.dtype == torch.bfloat16 and _is_aligned(weight):
            ways.append("torch")
    return (*ways, "loop")


def _loop(
    x: torch.Tensor,
    weight: GroupedWeight,
    groups: TokenGroups,
    rows: Rows,
    out_rows: Literal["pairs", "sorted"],
    activation: GatedActivation | None,
) -> torch.Tensor:
    """Expert by expert, of those that have tokens. Needs the offsets on the host."""
    num_outputs = weight.shape[1] // (1 if activation is None else 2)
    result = x.new_empty(groups.num_pairs, num_outputs)
    offsets = groups.offsets.tolist()
    sources = None if rows == "sorted" else groups.pairs if rows == "pairs" else groups.tokens
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            continue
        part = x[begin:end] if sources is None else x.index_select(0, sources[begin:end])
        product = _activated(weight.linear(expert, part), activation)
        if out_rows == "pairs":
            result.index_copy_(0, groups.pairs[begin:end].long(), product)
        else:
            result[begin:end] = product
    return result


def _torch(x: torch.Tensor, weight: GroupedWeight, groups: TokenGroups) -> torch.Tensor:
    """PyTorch's grouped product, (N, K) to (N, M), both sorted."""
    assert isinstance(weight, PlainWeight)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    product: torch.Tensor = grouped_mm(x, weight.weight.transpose(1, 2), offs=groups.offsets[1:])
    if weight.bias is None:
        return product
    places = torch.arange(groups.num_pairs, dtype=torch.int32, device=x.device)
    experts = torch.searchsorted(groups.offsets[1:], places, right=True)
    return product.add_(weight.bias.index_select(0, experts))


def _triton(
    x: torch.Tensor,
    weight: GroupedWeight,
    groups: TokenGroups,
    rows: Rows,
    out_rows: Literal["pairs", "sorted"],
    activation: GatedActivation | None,
    routed_before: bool,
    tile: GroupedTile | Mxfp4Tile | None,
) -> torch.Tensor:
    if isinstance(weight, Mxfp4Weight):
        many = in_bfloat16(groups.num_pairs, groups.num_experts) if tile is None else isinstance(tile, GroupedTile)
        if not many:
            return _mxfp4(x, weight, groups, rows, out_rows, activation, routed_before, tile)
        weight = weight.dequantized()
    from workers.ops.triton.grouped_linear import grouped_tile, launch_grouped_linear
    from workers.ops.triton.grouped_tma_rows import has_tma

    assert isinstance(weight, PlainWeight)
    assert not isinstance(tile, Mxfp4Tile)
    out = x.new_empty(groups.num_pairs, weight.shape[1] // (1 if activation is None else 2))
    tile = tile or grouped_tile(groups.num_pairs, weight.weight, activation is not None)
    if tile.kernel == "tma_rows" and not has_tma(weight.weight, x if rows == "sorted" else None):
        tile = without_tma(tile)
    if tile.copied and rows != "sorted":
        x, rows = _gathered(x, groups, rows), "sorted"
    alone = tile.kernel == "few_rows" and groups.num_tokens == 1 and "sorted" not in (rows, out_rows)
    launch_grouped_linear(
        out,
        x,
        weight.weight,
        tile,
        groups.ids.reshape(-1) if alone else groups.tiles(tile.rows),
        None if alone else groups.pairs,
        offsets=groups.offsets if tile.kernel == "tma_rows" else None,
        bias=weight.bias,
        pairs_per_row=_pairs_per_row(groups, rows),
        spread=out_rows == "pairs",
        activation=_constants(activation),
        num_tokens=groups.num_tokens,
        num_shared=groups.num_shared,
        routed_before=routed_before,
    )
    return out


def _mxfp4(
    x: torch.Tensor,
    weight: Mxfp4Weight,
    groups: TokenGroups,
    rows: Rows,
    out_rows: Literal["pairs", "sorted"],
    activation: GatedActivation | None,
    routed_before: bool,
    tile: GroupedTile | Mxfp4Tile | None,
) -> torch.Tensor:
    """The kernel that reads MXFP4; its tiles have the weights' rows first, as those of `few_rows`."""
    from workers.ops.triton.mxfp4_linear import launch_mxfp4_linear, mxfp4_tile

    num_experts, num_outputs, _ = weight.shape
    out = x.new_empty(groups.num_pairs, num_outputs // (1 if activation is None else 2))
    alone = groups.num_tokens == 1 and "sorted" not in (rows, out_rows)
    tile = tile or mxfp4_tile(groups.num_pairs, num_experts, activation is not None, x, alone)
    assert isinstance(tile, Mxfp4Tile)
    launch_mxfp4_linear(
        out,
        x,
        weight.words,
        weight.exponents,
        tile,
        groups.ids.reshape(-1) if alone else groups.tiles(tile.rows),
        None if alone else groups.pairs,
        bias=weight.bias,
        pairs_per_row=_pairs_per_row(groups, rows),
        spread=out_rows == "pairs",
        activation=_constants(activation),
        routed_before=routed_before,
    )
    return out


def _pairs_per_row(groups: TokenGroups, rows: Rows) -> int:
    return {"sorted": 0, "pairs": 1, "tokens": groups.top_k}[rows]


def _constants(activation: GatedActivation | None) -> tuple[str, float, float] | None:
    return None if activation is None else (activation.kind, activation.alpha, activation.limit)


def _gathered(x: torch.Tensor, groups: TokenGroups, rows: Rows) -> torch.Tensor:
    if rows == "sorted":
        return x
    return x.index_select(0, groups.pairs if rows == "pairs" else groups.tokens)


def _spread(product: torch.Tensor, groups: TokenGroups, out_rows: Literal["pairs", "sorted"]) -> torch.Tensor:
    if out_rows == "sorted":
        return product
    return torch.empty_like(product).index_copy_(0, groups.pairs.long(), product)


def _activated(product: torch.Tensor, activation: GatedActivation | None) -> torch.Tensor:
    return product if activation is None else activation(product)


def _check(
    x: torch.Tensor, weight: GroupedWeight, groups: TokenGroups, rows: Rows, activation: GatedActivation | None
) -> None:
    num_experts, num_outputs, num_inputs = weight.shape
    num_rows = groups.num_tokens if rows == "tokens" else groups.num_pairs
    if x.shape != (num_rows, num_inputs) or x.dtype != weight.dtype or x.stride(1) != 1:
        raise ValueError(
            f"x of {x.dtype} {tuple(x.shape)} with strides {x.stride()}: needs contiguous rows of {weight.dtype} "
            f"{(num_rows, num_inputs)}"
        )
    if groups.num_experts != num_experts:
        raise ValueError(f"pairs of {groups.num_experts} experts for the weights of {num_experts}")
    if activation is not None and num_outputs % 2:
        raise ValueError(f"{num_outputs} outputs: a gated activation needs as many of gate as of up")


def _is_aligned(weight: GroupedWeight) -> bool:
    """PyTorch's kernel reads rows of 16 bytes' multiples."""
    _, num_outputs, num_inputs = weight.shape
    return num_outputs * weight.dtype.itemsize % 16 == 0 and num_inputs * weight.dtype.itemsize % 16 == 0


@functools.cache
def _has_grouped_mm(device: torch.device) -> bool:
    found = hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
    return found and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
