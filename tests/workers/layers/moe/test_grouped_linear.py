"""The grouped product by every way that this machine has, and its kernels, against float64.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from workers.layers.activation import GatedActivation
from workers.layers.moe.grouped_linear import grouped_linear, usable_ways
from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.layers.moe.token_groups import group_tokens, sort_pairs
from workers.layers.moe.ways import WAYS, way_for
from workers.ops.grouped_tiles import GroupedTile, without_tma
from workers.ops.sum_tiles import SumTile
from workers.ops.tensor_map import has_tensor_map
from workers.ops.weighted_sum import (
    WeightedRows,
    add_weighted_rms_norm,
    summed,
    weighted_sum,
    weighted_sum_torch,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [
    GatedActivation("silu"),
    GatedActivation("gelu"),
    GatedActivation("gelu_tanh"),
    GatedActivation("clamped_swiglu", 1.702, 2.0),
]
NAN = float("nan")


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The launch functions, of kernels that the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from attention.ops.triton import launch
        from workers.ops.triton import (
            chosen_experts_sum,
            counting_sort,
            grouped_linear,
            token_groups,
            weighted_sum,
        )
    for function in (language.sum, grouped_linear.grouped_few_rows_kernel, token_groups.tile_map_kernel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return SimpleNamespace(
        traits=launch.device_traits(DEVICE),
        product=grouped_linear.launch_grouped_linear,
        tile_for=grouped_linear.grouped_tile,
        tiles=[
            GroupedTile(16, 32, 16, bundle=2, num_stages=2, num_warps=2),
            GroupedTile(16, 32, 16, 2, num_stages=2, num_warps=2, kernel="few_rows", prefetched=32),
            GroupedTile(16, 32, 16, 2, num_stages=2, num_warps=4, kernel="tma_rows"),
        ],
        groups=token_groups.launch_group_tokens,
        counting_sort=counting_sort.launch_counting_sort,
        tile_map=token_groups.launch_tile_map,
        most_tiles=token_groups.most_tiles,
        sum=weighted_sum.launch_weighted_sum,
        sum_and_norm=weighted_sum.launch_add_weighted_rms_norm,
        chosen=chosen_experts_sum.launch_chosen_experts_sum,
        sum_tile=SumTile(outputs=16, inputs=16, num_stages=2, num_warps=2, prefetched=16),
    )


KERNELS = ["many_rows", "few_rows"]


def tile_of(kernels: SimpleNamespace, kernel: str) -> Any:
    """A small tile of that kernel."""
    return next(tile for tile in kernels.tiles if tile.kernel == kernel)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def some_ids(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Experts of tokens, those of small numbers more often, and the last never."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.arange(num_experts - 1, 0, -1).double().expand(num_tokens, -1)
    return torch.multinomial(chances, top_k, generator=generator).to(DEVICE)


def exact(
    x: torch.Tensor, weight: PlainWeight, ids: torch.Tensor, activation: GatedActivation | None = None
) -> torch.Tensor:
    """(T * k, M) float64, in the order of the pairs."""
    rows = x.double().repeat_interleave(ids.shape[1], dim=0)
    experts = ids.reshape(-1)
    product = torch.einsum("nk,nmk->nm", rows, weight.weight.double()[experts])
    if weight.bias is not None:
        product += weight.bias.double()[experts]
    if activation is None:
        return product
    gate, up = product.chunk(2, dim=-1)
    if activation.kind == "clamped_swiglu":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if activation.kind == "silu":
        return gate * torch.sigmoid(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if "tanh" in activation.kind else "none") * up


def assert_close(actual: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    """Float32 sums err by some units of the largest; the interpreter rounds to bfloat16 towards zero."""
    unit = torch.finfo(actual.dtype).eps * (1.0 if DEVICE.type == "cpu" else 0.51) * roundings
    allowed = unit * (expected.abs() + (roundings - 1) * expected.abs().max())
    allowed += 100 * torch.finfo(torch.float32).eps * (1.0 + expected.abs().max())
    assert not actual.isnan().any()
    assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (5, 3, 2), (300, 9, 4), (1500, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_are_sorted_by_expert(
    kernels: SimpleNamespace, num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    ids = some_ids(num_tokens, num_experts, top_k).to(dtype)
    by_hand = [[n for n, e in enumerate(ids.reshape(-1).tolist()) if e == expert] for expert in range(num_experts)]
    ends = [sum(map(len, by_hand[:e])) for e in range(num_experts + 1)]
    in_order = [n for expert in by_hand for n in expert]
    groups = group_tokens(ids, num_experts)
    assert groups.tokens.tolist() == [n // top_k for n in in_order]
    by_kernel = kernels.groups(ids, num_experts, 16)[:2]
    for pairs, offsets in ((groups.pairs, groups.offsets), sort_pairs(ids, num_experts), by_kernel):
        assert pairs.tolist() == in_order
        assert offsets.tolist() == ends
        assert (pairs.dtype, offsets.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize(("num_tokens", "num_experts", "most_runs"), [(37, 9, 256), (37, 40, 2)])
def test_many_pairs_are_sorted_in_runs(
    kernels: SimpleNamespace, num_tokens: int, num_experts: int, most_runs: int
) -> None:
    """Runs of one block and of several, the last of them not full."""
    ids = some_ids(num_tokens, num_experts, 3)
    pairs, offsets = (torch.full((n,), -1, dtype=torch.int32, device=DEVICE) for n in (ids.numel(), num_experts + 1))
    max_tiles = kernels.most_tiles(ids.numel(), num_experts, 16)
    tiles = torch.full((3, max_tiles), -1, dtype=torch.int32, device=DEVICE)
    kernels.counting_sort(pairs, offsets, tiles, ids.reshape(-1), 16, block=32, most_runs=most_runs)
    expected = sort_pairs(ids, num_experts)
    assert torch.equal(pairs, expected[0])
    assert torch.equal(offsets, expected[1])
    wanted = kernels.tile_map(offsets, ids.numel(), 16)
    there = wanted[0] < num_experts
    assert torch.equal(tiles[0], wanted[0])
    assert torch.equal(tiles[:, there], wanted[:, there])


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (40, 3, 2), (90, 40, 4)])
@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_hold_every_pair_once(
    kernels: SimpleNamespace, num_tokens: int, num_experts: int, top_k: int, rows: int
) -> None:
    groups = group_tokens(some_ids(num_tokens, num_experts, top_k), num_experts)
    offsets = groups.offsets.tolist()
    wanted = [
        (expert, row, offsets[expert + 1])
        for expert in range(num_experts)
        for row in range(offsets[expert], offsets[expert + 1], rows)
    ]
    at_once = kernels.groups(groups.ids, num_experts, rows)[2]
    for tiles in (kernels.tile_map(groups.offsets, groups.num_pairs, rows), at_once):
        assert len(wanted) <= tiles.shape[1] == kernels.most_tiles(groups.num_pairs, num_experts, rows)
        assert list(zip(*tiles.tolist(), strict=True))[: len(wanted)] == wanted
        assert set(tiles[0].tolist()[len(wanted) :]) <= {num_experts}


def test_tiles_are_made_once_for_each_number_of_rows(kernels: SimpleNamespace) -> None:
    groups = group_tokens(some_ids(40, 5, 2), 5)
    assert groups.tiles(16) is groups.tiles(16)
    assert torch.equal(groups.tiles(32), kernels.tile_map(groups.offsets, 80, 32))


@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "dtype"),
    [(1, 16, 32, torch.float32), (30, 33, 40, torch.float32), *[(9, 40, 20, dtype) for dtype in DTYPES]],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_gathers_multiplies_and_spreads(
    kernels: SimpleNamespace, kernel: str, num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    ids = some_ids(num_tokens, 4, 2)
    x = randn(num_tokens, num_inputs, dtype=dtype)
    weight = PlainWeight(randn(4, num_outputs, num_inputs, dtype=dtype, seed=1), randn(4, num_outputs, dtype=dtype))
    groups, expected = group_tokens(ids, 4), exact(x, weight, ids)
    pairs = x.repeat_interleave(2, dim=0)
    for source, pairs_per_row, spread in ((x, 2, False), (pairs, 1, True), (pairs[groups.pairs.long()], 0, True)):
        out = torch.full((2 * num_tokens, num_outputs), NAN, dtype=dtype, device=DEVICE)
        kernels.product(
            out,
            source,
            weight.weight,
            tile_of(kernels, kernel),
            groups.tiles(16),
            groups.pairs,
            bias=weight.bias,
            pairs_per_row=pairs_per_row,
            spread=spread,
            routed_before=spread,
        )
        assert_close(out, expected if spread else expected[groups.pairs.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_applies_the_activation_before_rounding(
    kernels: SimpleNamespace, kernel: str, activation: GatedActivation, dtype: torch.dtype
) -> None:
    ids, x = some_ids(8, 3, 2), randn(8, 32, dtype=dtype)
    weight = PlainWeight(randn(3, 2 * 24, 32, dtype=dtype, seed=1) / 4, randn(3, 48, dtype=dtype, seed=2))
    groups = group_tokens(ids, 3)
    out = torch.full((16, 24), NAN, dtype=dtype, device=DEVICE)
    kernels.product(
        out,
        x,
        weight.weight,
        tile_of(kernels, kernel),
        groups.tiles(16),
        groups.pairs,
        bias=weight.bias,
        pairs_per_row=2,
        spread=True,
        activation=(activation.kind, activation.alpha, activation.limit),
    )
    assert_close(out, exact(x, weight, ids, activation))


@pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="a kernel for Hopper"
)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("activation", [None, ACTIVATIONS[0]], ids=["plain", "gated"])
@pytest.mark.parametrize(("num_inputs", "num_outputs", "outputs"), [(40, 24, 32), (32, 300, 256)])
def test_kernel_whose_tiles_follow_each_other(
    kernels: SimpleNamespace,
    num_inputs: int,
    num_outputs: int,
    outputs: int,
    activation: GatedActivation | None,
    dtype: torch.dtype,
) -> None:
    """Of rows that are gathered and of sorted ones; more tiles than programs; results stored in one and in halves."""
    ids, x = some_ids(37, 5, 2), randn(37, num_inputs, dtype=dtype)
    parts = 1 if activation is None else 2
    weight = randn(5, parts * num_outputs, num_inputs, dtype=dtype, seed=1) / 4
    weight = PlainWeight(weight, randn(5, parts * num_outputs, dtype=dtype, seed=2))
    groups, expected = group_tokens(ids, 5), exact(x, weight, ids, activation)
    in_order = groups.pairs.long()
    tile = replace(tile_of(kernels, "tma_rows"), outputs=outputs)
    for source, pairs_per_row, spread in ((x, 2, False), (x.repeat_interleave(2, dim=0)[in_order], 0, True)):
        out = torch.full((74, num_outputs), NAN, dtype=dtype, device=DEVICE)
        kernels.product(
            out,
            source,
            weight.weight,
            tile,
            groups.tiles(16),
            groups.pairs,
            offsets=groups.offsets,
            bias=weight.bias,
            pairs_per_row=pairs_per_row,
            spread=spread,
            activation=None if activation is None else (activation.kind, activation.alpha, activation.limit),
        )
        assert_close(out, expected if spread else expected[in_order])


def test_a_kernel_that_needs_groups_is_refused_without(kernels: SimpleNamespace) -> None:
    x, weight, groups = randn(4, 16).half(), randn(2, 32, 16).half(), group_tokens(some_ids(4, 2, 1), 2)
    with pytest.raises(ValueError, match="tma_rows needs the groups' pairs and offsets"):
        kernels.product(x.new_empty(4, 32), x, weight, tile_of(kernels, "tma_rows"), groups.tiles(16), groups.pairs)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, contiguous, from one element after an aligned address on."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


def in_wider_rows(tensor: torch.Tensor, more: int) -> torch.Tensor:
    """The same, as a slice of a tensor with so many more columns."""
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:-1], more)], dim=-1)[..., : tensor.shape[-1]]


def test_what_a_tensor_map_describes() -> None:
    for dtype in DTYPES[1:]:
        weight, x = randn(3, 5, 40, dtype=dtype), randn(7, 40, dtype=dtype)
        for fits in (weight, x, x[2:], in_wider_rows(x, 8), x[:, 8:], randn(1, 24, dtype=dtype)):
            assert has_tensor_map(fits)
        odd, share = randn(3, 5, 44, dtype=dtype), weight[..., :20].contiguous()
        for other in (odd, share, shifted(weight), in_wider_rows(x, 1), x[:, 1:], x.mT, x[:0]):
            assert not has_tensor_map(other)
    assert not has_tensor_map(randn(3, 8)), "exact float32 needs another product"
    assert not has_tensor_map(torch.zeros(3, 16, dtype=torch.int16)), "16 bits, but no floats"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="as if the interpreter's device were another")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("num_inputs", "arch", "change_x", "change_weight", "taken"),
    [
        (40, "sm90", None, None, (True, True)),
        (40, "sm100", None, None, (False, False)),
        (40, "sm80", None, None, (False, False)),
        (44, "sm90", None, None, (False, False)),
        (40, "sm90", None, shifted, (False, False)),
        (40, "sm90", shifted, None, (True, False)),
        (40, "sm90", partial(in_wider_rows, more=1), None, (True, False)),
        (40, "sm90", partial(in_wider_rows, more=8), None, (True, True)),
    ],
    ids=["fits", "sm100", "sm80", "odd K", "weight's address", "x's address", "x's stride", "x's aligned stride"],
)
def test_tma_reads_what_it_can_and_pointers_the_rest(
    kernels: SimpleNamespace,
    num_inputs: int,
    arch: str,
    change_x: Any,
    change_weight: Any,
    taken: tuple[bool, bool],
    copied: bool,
) -> None:
    """Of rows that are gathered or copied, which may lie anyhow, and of sorted ones; the product is the same."""
    ids, x = some_ids(9, 4, 2), randn(9, num_inputs, dtype=torch.float16)
    matrices = randn(4, 24, num_inputs, dtype=torch.float16, seed=1)
    weight = PlainWeight(matrices if change_weight is None else change_weight(matrices))
    groups, expected = group_tokens(ids, 4), exact(x, weight, ids)
    tile = replace(tile_of(kernels, "tma_rows"), copied=copied, num_stages=4)
    module, moe = "workers.ops.triton.grouped_tma_rows", "workers.layers.moe.grouped_linear"
    traits = replace(kernels.traits, arch=arch)
    for rows, source, by_tma in (("tokens", x, taken[0]), ("sorted", x[groups.tokens.long()], taken[1])):
        with (
            mock.patch(f"{module}.device_traits", return_value=traits),
            mock.patch(f"{moe}.usable_ways", return_value=("triton",)),
            mock.patch("workers.ops.triton.grouped_linear.launch_grouped_linear", wraps=kernels.product) as launch,
        ):
            source = source if change_x is None else change_x(source)
            out = grouped_linear(source, weight, groups, rows=rows, out_rows="pairs", way="triton", tile=tile)
        assert launch.call_args.args[3] == (tile if by_tma else without_tma(tile))
        assert_close(out, expected)
    assert without_tma(tile) == replace(tile, kernel="many_rows", num_stages=3, copied=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_pairs_of_one_token_need_no_order(kernels: SimpleNamespace, gated: bool, dtype: torch.dtype) -> None:
    ids, activation = some_ids(1, 6, 4), ACTIVATIONS[0] if gated else None
    weight = PlainWeight(randn(6, 40, 48, dtype=dtype, seed=1) / 4, randn(6, 40, dtype=dtype, seed=2))
    for pairs_per_row, x in ((4, randn(1, 48, dtype=dtype)), (1, randn(4, 48, dtype=dtype))):
        out = torch.full((4, 20 if gated else 40), NAN, dtype=dtype, device=DEVICE)
        kernels.product(
            out,
            x,
            weight.weight,
            tile_of(kernels, "few_rows"),
            ids.reshape(-1),
            None,
            bias=weight.bias,
            pairs_per_row=pairs_per_row,
            spread=True,
            activation=("silu", 0.0, 0.0) if gated else None,
        )
        rows = x.expand(4, -1) if pairs_per_row == 4 else x
        assert_close(out, exact(rows, weight, ids.reshape(4, 1), activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_inputs", "num_outputs"), [(1, 48, 40), (3, 33, 16)])
def test_second_product_and_sum_as_one(
    kernels: SimpleNamespace, weighted: bool, num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    ids, x = some_ids(num_tokens, 6, 4), randn(num_tokens * 4, num_inputs, dtype=dtype)
    weight = PlainWeight(randn(6, num_outputs, num_inputs, dtype=dtype, seed=1), randn(6, num_outputs, dtype=dtype))
    weights = torch.rand(num_tokens, 4, device=DEVICE) if weighted else None
    added = randn(num_tokens, num_outputs, dtype=dtype, seed=3) if weighted else None
    expected = exact(x, weight, ids.reshape(-1, 1)).view(num_tokens, 4, num_outputs)
    expected = (expected if weights is None else expected * weights.double()[..., None]).sum(dim=1)
    expected = expected if added is None else expected + added.double()
    out = torch.full((num_tokens, num_outputs), NAN, dtype=dtype, device=DEVICE)
    tile = kernels.sum_tile
    kernels.chosen(out, x, weight.weight, ids, weights, bias=weight.bias, added=added, tile=tile)
    assert_close(out, expected)


@pytest.mark.parametrize("num_tokens", [3, 150])
def test_kernel_with_the_tables_tiles(kernels: SimpleNamespace, num_tokens: int) -> None:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    ids, x = some_ids(num_tokens, 3, 2), randn(num_tokens, 96, dtype=dtype)
    weight = PlainWeight(randn(3, 144, 96, dtype=dtype, seed=1))
    groups = group_tokens(ids, 3)
    out = torch.full((num_tokens * 2, 144), NAN, dtype=dtype, device=DEVICE)
    tile = kernels.tile_for(groups.num_pairs, weight.weight, False)
    tiles = groups.tiles(tile.rows)
    kernels.product(out, x, weight.weight, tile, tiles, groups.pairs, pairs_per_row=2, spread=True)
    assert_close(out, exact(x, weight, ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 31])
def test_every_way_is_the_product(num_tokens: int, activation: GatedActivation | None, dtype: torch.dtype) -> None:
    ids, x = some_ids(num_tokens, 8, 3), randn(num_tokens, 64, dtype=dtype)
    weight = PlainWeight(randn(8, 48, 64, dtype=dtype, seed=1) / 4, randn(8, 48, dtype=dtype, seed=2))
    groups, expected = group_tokens(ids, 8), exact(x, weight, ids, activation)
    pairs = x.repeat_interleave(3, dim=0)
    sources = {"tokens": x, "pairs": pairs, "sorted": pairs[groups.pairs.long()]}
    for way in usable_ways(weight):
        for rows, source in sources.items():
            spread = grouped_linear(source, weight, groups, rows=rows, out_rows="pairs", activation=activation, way=way)
            assert_close(spread, expected, roundings=3)
            in_order = grouped_linear(source, weight, groups, rows=rows, activation=activation, way=way)
            assert torch.equal(in_order, spread[groups.pairs.long()])


class CountingWeight(GroupedWeight):
    """Whole numbers with a scale for each expert, as a format that stays quantised would be."""

    def __init__(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        self.numbers, self.scales, self.used = numbers, scales, []
        self.shape, self.dtype, self.device = tuple(numbers.shape), torch.float32, numbers.device

    shape = dtype = device = None  # type: ignore[assignment]  # instance attributes in place of the properties

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        self.used.append(expert)
        return x @ (self.numbers[expert].float() * self.scales[expert]).t()


def test_a_format_needs_no_more_than_its_own_product() -> None:
    numbers = torch.randint(-7, 8, (5, 12, 16), dtype=torch.int8, device=DEVICE)
    weight = CountingWeight(numbers, torch.rand(5, device=DEVICE))
    ids, x = torch.tensor([[4, 1], [1, 2]], device=DEVICE), randn(2, 16)
    assert usable_ways(weight) == ("loop",)
    out = grouped_linear(x, weight, group_tokens(ids, 5), rows="tokens", out_rows="pairs")
    plain = PlainWeight((numbers.float() * weight.scales[:, None, None]).contiguous())
    assert_close(out, exact(x, plain, ids))
    assert weight.used == [1, 2, 4], "nothing is computed for experts without tokens"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_added", [False, True])
def test_weighted_sum(kernels: SimpleNamespace, dtype: torch.dtype, weighted: bool, with_added: bool) -> None:
    rows = randn(7 * 3, 50, dtype=dtype)
    weights = randn(7, 3, seed=1) if weighted else None
    added = randn(7, 50, dtype=dtype, seed=2) if with_added else None
    expected = rows.double().view(7, 3, 50)
    expected = (expected if weights is None else expected * weights.double()[..., None]).sum(dim=1)
    expected = expected if added is None else expected + added.double()
    out = torch.full((7, 50), NAN, dtype=dtype, device=DEVICE)
    kernels.sum(out, rows, 3, weights, added)
    for result in (out, weighted_sum(rows, 3, weights, added), weighted_sum_torch(rows, 3, weights, added)):
        assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weights", [False, True])
def test_a_sum_that_a_norm_follows(kernels: SimpleNamespace, dtype: torch.dtype, with_weights: bool) -> None:
    rows, residual, norm = randn(7 * 3, 50, dtype=dtype), randn(7, 50, dtype=dtype, seed=1), randn(50, seed=2)
    weights, added = (randn(7, 3, seed=3), randn(7, 50, dtype=dtype, seed=4)) if with_weights else (None, None)
    summand = WeightedRows(rows, 3, weights, added)
    total = summed(summand).double() + residual.double()
    expected = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    by_op, by_kernel, out = residual.clone(), residual.clone(), torch.full_like(residual, NAN)
    normalized = add_weighted_rms_norm(summand, by_op, norm, 1e-6)
    kernels.sum_and_norm(out, rows, 3, weights, added, by_kernel, norm, 1e-6)
    # Rounded three times; the interpreter rounds to bfloat16 towards zero.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 4e-2)
    for stream, found in ((by_op, normalized), (by_kernel, out)):
        torch.testing.assert_close(stream.double(), total, rtol=rtol, atol=atol)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


def test_a_sum_that_fits_neither_stream_nor_norm_is_refused() -> None:
    summand = WeightedRows(randn(6, 8), 3)
    with pytest.raises(ValueError, match=r"residual of torch.float32 \(3, 8\)"):
        add_weighted_rms_norm(summand, randn(3, 8), torch.ones(8, device=DEVICE), 1e-6)
    with pytest.raises(ValueError, match=r"weight of torch.float32 \(7,\)"):
        add_weighted_rms_norm(summand, randn(2, 8), torch.ones(7, device=DEVICE), 1e-6)


def test_the_table_names_ways_in_order_of_tokens() -> None:
    for ways in WAYS.values():
        assert [begin for begin, _ in ways] == sorted({begin for begin, _ in ways})
        assert ways[0][0] <= 1
        assert all(preferred[-1] == "loop" for _, preferred in ways)


def test_the_first_preferred_way_that_is_usable_is_taken() -> None:
    table = {"cuda": ((1, ("triton", "loop")), (64, ("torch", "triton", "loop")))}
    with mock.patch("workers.layers.moe.ways.WAYS", table):
        cuda = torch.device("cuda")
        assert way_for(63, ("triton", "torch", "loop"), cuda) == "triton"
        assert way_for(64, ("triton", "torch", "loop"), cuda) == "torch"
        assert way_for(64, ("triton", "loop"), cuda) == "triton"
        assert way_for(64, ("loop",), cuda) == "loop"
        assert way_for(64, ("triton", "loop"), torch.device("xpu")) == "loop"


def test_a_way_that_cannot_compute_it_is_refused() -> None:
    weight = PlainWeight(randn(2, 8, 8).cpu())
    with pytest.raises(ValueError, match="on cpu cannot be computed by triton"):
        grouped_linear(randn(2, 8).cpu(), weight, group_tokens(torch.tensor([[0], [1]]), 2), way="triton")


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of shape \(2, 3, 4\) with strides"):
        PlainWeight(randn(2, 4, 3).mT)
    with pytest.raises(ValueError, match=r"bias of torch.float32 \(2, 4\)"):
        PlainWeight(randn(2, 3, 4), randn(2, 4))
    with pytest.raises(ValueError, match="pairs of 3 experts for the weights of 2"):
        grouped_linear(randn(1, 4), PlainWeight(randn(2, 3, 4)), group_tokens(torch.zeros(1, 1).long(), 3))
    with pytest.raises(ValueError, match="3 outputs: a gated activation"):
        grouped_linear(
            randn(1, 4),
            PlainWeight(randn(2, 3, 4)),
            group_tokens(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 2),
            activation=ACTIVATIONS[0],
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["triton", "torch"])
def test_a_cuda_graph_replays_any_routing(way: str) -> None:
    weight = PlainWeight(randn(8, 128, 64, dtype=torch.bfloat16, seed=1))
    x, ids = randn(32, 64, dtype=torch.bfloat16), some_ids(32, 8, 2)

    def run() -> torch.Tensor:
        return grouped_linear(x, weight, group_tokens(ids, 8), rows="tokens", out_rows="pairs", way=way)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(1, 4):
        ids.copy_(some_ids(32, 8, 2, seed))
        x.copy_(randn(32, 64, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert_close(out, exact(x, weight, ids))
