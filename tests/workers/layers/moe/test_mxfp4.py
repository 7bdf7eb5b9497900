"""Experts that stay in MXFP4: their words, their kernels and the module, against the numbers in float64.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from workers.errors import CheckpointError, ConfigError
from workers.layers.activation import GatedActivation
from workers.layers.moe.experts import Experts, GroupedLinear
from workers.layers.moe.grouped_linear import grouped_linear, usable_ways
from workers.layers.moe.mxfp4 import MXFP4, Mxfp4Weight
from workers.layers.moe.token_groups import group_tokens
from workers.loading.dequantize import dequantize_mxfp4
from workers.ops.mxfp4_tiles import MOST_QUANTIZED, TILES, Mxfp4Tile, choose_mxfp4_tile, in_bfloat16
from workers.ops.mxfp4_tiles import STAYING as STAYING_TILES
from workers.ops.mxfp4_words import (
    dequantized_words,
    from_exponents,
    from_words,
    to_exponents,
    to_words,
)
from workers.ops.weighted_sum import summed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CLAMPED = GatedActivation("clamped_swiglu", 1.702, 2.0)
NAN = float("nan")


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The launch functions, of kernels that the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.ops.triton import mxfp4_linear, token_groups
    for function in (language.sum, mxfp4_linear.mxfp4_rows_kernel, token_groups.tile_map_kernel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return SimpleNamespace(product=mxfp4_linear.launch_mxfp4_linear, dequantize=mxfp4_linear.launch_dequantize_mxfp4)


def stored(num_experts: int, num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales as a checkpoint has them, with every number and scales from 2^-7 to 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_experts, num_outputs, num_inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 128, shape, dtype=torch.uint8, generator=generator)
    return blocks.to(DEVICE), scales.to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = KERNEL_DTYPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def some_ids(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Experts of tokens; the last one is nobody's."""
    chances = torch.arange(num_experts - 1, 0, -1).double().expand(num_tokens, -1)
    return torch.multinomial(chances, top_k, generator=torch.Generator().manual_seed(num_tokens)).to(DEVICE)


def exact(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    activation: GatedActivation | None,
) -> torch.Tensor:
    """(N, M) float64 of rows that have an expert each."""
    product = torch.einsum("nk,nmk->nm", x.double(), weight.double()[experts])
    product = product if bias is None else product + bias.double()[experts]
    if activation is None:
        return product
    gate, up = product.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 if found.dtype == torch.float32 else 6e-3
    assert not found.isnan().any()
    assert float((found.double() - expected).norm() / expected.norm()) < limit


def test_words_hold_every_number_of_a_block() -> None:
    blocks, scales = stored(3, 20, 96)
    words, exponents = to_words(blocks), to_exponents(scales)
    assert words.shape == (3, 3, 20, 8)
    assert exponents.shape == (3, 1, 20)
    for expert in range(3):
        assert torch.equal(from_words(words[expert]), blocks[expert])
        assert torch.equal(from_exponents(exponents[expert], 3), scales[expert])
        numbers = dequantized_words(words[expert], exponents[expert], torch.bfloat16)
        assert torch.equal(numbers, dequantize_mxfp4(blocks[expert], scales[expert], torch.bfloat16))


def test_scales_of_any_size_come_back() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(1, 8, 32)
    assert torch.equal(from_exponents(to_exponents(scales)[0], 32), scales[0])


def test_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8 \(2, 4, 16\): needs uint8"):
        to_words(torch.zeros(2, 4, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"torch.int8 \(1, 2, 4, 16\)"):
        to_words(torch.zeros(1, 2, 4, 16, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(40, 96), (32, 288)])
def test_kernel_dequantises_exactly(
    kernels: SimpleNamespace, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    blocks, scales = stored(2, num_outputs, num_inputs)
    out = torch.full((2, num_outputs, num_inputs), NAN, dtype=dtype, device=DEVICE)
    if DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("the kernel's numbers are bfloat16")
    kernels.dequantize(out, to_words(blocks), to_exponents(scales))
    assert torch.equal(out, dequantize_mxfp4(blocks, scales, dtype))


TILE = Mxfp4Tile(rows=16, outputs=32 if DEVICE.type == "cpu" else 64, inputs=128, bundle=2, num_stages=2, num_warps=4)
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
STAYING = Mxfp4Tile(rows=16, outputs=64, inputs=128, bundle=1, num_stages=4, num_warps=4, staying=2)
KERNELS = [TILE, *([STAYING, replace(STAYING, rows=8, staying=1, num_stages=3)] if HOPPER else [])]
"""Both kernels, where both run."""


@pytest.mark.parametrize("tile", KERNELS, ids=lambda tile: f"{tile.rows} rows, {tile.staying} stay")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [None, CLAMPED], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs"), [(3, 96, 48), (25, 256, 64), *([(300, 672, 1000)] if HOPPER else [])]
)
def test_kernel_gathers_multiplies_and_spreads(
    kernels: SimpleNamespace,
    num_tokens: int,
    num_inputs: int,
    num_outputs: int,
    activation: GatedActivation | None,
    biased: bool,
    tile: Mxfp4Tile,
) -> None:
    """Of experts with no rows and with several tiles of them; the last outputs and inputs do not fill a tile."""
    parts = 1 if activation is None else 2
    blocks, scales = stored(4, parts * num_outputs, num_inputs)
    weight = dequantize_mxfp4(blocks, scales, torch.float32)
    bias = randn(4, parts * num_outputs, seed=2) if biased else None
    ids, x = some_ids(num_tokens, 4, 2), randn(num_tokens, num_inputs) / 8
    groups, pairs = group_tokens(ids, 4), x.repeat_interleave(2, dim=0)
    expected, in_order = exact(pairs, weight, bias, ids.reshape(-1), activation), groups.pairs.long()
    for source, pairs_per_row, spread in ((x, 2, False), (pairs, 1, True), (pairs[in_order], 0, True)):
        out = torch.full((2 * num_tokens, num_outputs), NAN, dtype=KERNEL_DTYPE, device=DEVICE)
        kernels.product(
            out,
            source,
            to_words(blocks),
            to_exponents(scales),
            tile,
            groups.tiles(tile.rows),
            groups.pairs,
            bias=bias,
            pairs_per_row=pairs_per_row,
            spread=spread,
            activation=None if activation is None else (activation.kind, activation.alpha, activation.limit),
            routed_before=spread,
        )
        assert_close(out, expected if spread else expected[in_order])


@pytest.mark.parametrize("activation", [None, CLAMPED], ids=["plain", "gated"])
def test_pairs_of_one_token_need_no_order(kernels: SimpleNamespace, activation: GatedActivation | None) -> None:
    parts, ids = 1 if activation is None else 2, some_ids(1, 6, 4)
    blocks, scales = stored(6, parts * 40, 160)
    weight, bias = dequantize_mxfp4(blocks, scales, torch.float32), randn(6, parts * 40, seed=1)
    for pairs_per_row, x in ((4, randn(1, 160) / 8), (1, randn(4, 160) / 8)):
        out = torch.full((4, 40), NAN, dtype=KERNEL_DTYPE, device=DEVICE)
        kernels.product(
            out,
            x,
            to_words(blocks),
            to_exponents(scales),
            TILE,
            ids.reshape(-1),
            None,
            bias=bias,
            pairs_per_row=pairs_per_row,
            spread=True,
            activation=None if activation is None else (activation.kind, activation.alpha, activation.limit),
        )
        assert_close(out, exact(x.expand(4, -1), weight, bias, ids.reshape(-1), activation))


def experts_of(method_mxfp4: bool, dtype: torch.dtype, hidden: int = 96, inner: int = 64) -> Experts:
    """The same numbers, kept in MXFP4 or plain."""
    own = {"method": MXFP4} if method_mxfp4 else {}
    experts = Experts(5, hidden, inner, CLAMPED, dtype, DEVICE, bias=True, **own)
    for seed, projection in enumerate((experts.gate_up_proj, experts.down_proj)):
        num_outputs, num_inputs = ((2 * inner, hidden), (hidden, inner))[seed]
        blocks, scales = stored(5, num_outputs, num_inputs, seed)
        scales -= 4
        if method_mxfp4:
            projection.blocks.copy_(blocks)
            projection.scales.copy_(scales)
        else:
            projection.weight.copy_(dequantize_mxfp4(blocks, scales, dtype))
        projection.bias.copy_(randn(5, num_outputs, seed=seed + 2))
    experts.process_weights()
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9, 700])
def test_a_layer_is_that_of_plain_weights(num_tokens: int, dtype: torch.dtype) -> None:
    ids, weights = some_ids(num_tokens, 5, 2), torch.rand(num_tokens, 2, device=DEVICE)
    x = randn(num_tokens, 96, dtype=dtype)
    found, expected = (summed(experts_of(kept, dtype).summands(x, ids, weights)) for kept in (True, False))
    if DEVICE.type == "cpu":
        assert torch.equal(found, expected), "the same numbers by the same products"
    assert_close(found, expected.double())


def test_packed_parameters_are_gone_once_they_are_processed() -> None:
    experts = experts_of(True, torch.bfloat16)
    assert {name for name, _ in experts.named_parameters()} == {"gate_up_proj.bias", "down_proj.bias"}
    weight = experts.gate_up_proj.all_experts()
    assert isinstance(weight, Mxfp4Weight)
    assert weight.shape == (5, 128, 96)
    assert weight.words.nbytes + weight.exponents.nbytes == 5 * 128 * (48 + 4)


def test_what_it_means_is_told_before_it_is_processed() -> None:
    projection = GroupedLinear((2, 8, 64), True, torch.bfloat16, DEVICE, MXFP4)
    blocks, scales = stored(2, 8, 64)
    projection.blocks.copy_(blocks)
    projection.scales.copy_(scales)
    numbers = projection.named_numbers()
    assert set(numbers) == {"weight", "bias"}
    plain = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    kept = numbers["weight"]
    assert (kept.shape, kept.nbytes, kept.dtype) == (tuple(plain.shape), plain.nbytes, plain.dtype)
    assert torch.equal(kept.part(64, 192), plain.reshape(-1)[64:192])


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 32 inputs, not 48"):
        GroupedLinear((2, 8, 48), False, torch.bfloat16, DEVICE, MXFP4)
    projection = GroupedLinear((2, 8, 64), False, torch.bfloat16, DEVICE, MXFP4)
    with pytest.raises(ValueError, match="after process_weights"):
        projection.all_experts()
    projection.scales.fill_(129)
    with (
        mock.patch("workers.layers.moe.mxfp4.kernels_read_mxfp4", return_value=True),
        pytest.raises(CheckpointError, match=r"MXFP4 scale of 2\^2: kernels compute with 2\^1 at most"),
    ):
        projection.process_weights()


def test_weights_that_do_not_fit_are_refused() -> None:
    blocks, scales = stored(2, 8, 64)
    words, exponents = to_words(blocks), to_exponents(scales)
    with pytest.raises(ValueError, match=r"words of torch.int32"):
        Mxfp4Weight(words.int(), exponents, torch.bfloat16)
    with pytest.raises(ValueError, match=r"exponents of torch.int32 \(2, 8, 1\): needs int32 \(2, 1, 8\)"):
        Mxfp4Weight(words, exponents.mT.contiguous(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"bias of torch.float32 \(2, 8\)"):
        Mxfp4Weight(words, exponents, torch.bfloat16, torch.zeros(2, 8, device=DEVICE))


@pytest.mark.parametrize("staying", [False, True])
def test_tables_have_a_tile_for_every_number_of_pairs(staying: bool) -> None:
    for num_pairs in (1, 4, 64, 256, 1024, 4096, 100000):
        rows = set()
        for gated in (True, False):
            tile = choose_mxfp4_tile(num_pairs, 32, gated, 227 << 10, staying)
            assert tile.inputs % 128 == 0
            assert tile.num_stages >= 1
            assert tile.rows >= (8 if tile.staying else 16)
            assert staying or not tile.staying
            rows.add(tile.rows)
        assert len(rows) == 1, "pairs are cut once"
    for ranges in (STAYING_TILES if staying else TILES).values():
        assert [begin for begin, _ in ranges] == sorted({begin for begin, _ in ranges})
        assert ranges[0][0] == 0
    assert in_bfloat16(int(32 * MOST_QUANTIZED), 32)
    assert not in_bfloat16(int(32 * MOST_QUANTIZED) - 1, 32)


GPT_OSS = GatedActivation("clamped_swiglu", 1.702, 7.0)


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0), reason="needs a CUDA device of SM 9.0"
)
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 256, 1024, 4096])
def test_products_of_gpt_oss(num_tokens: int) -> None:
    """At the sizes of gpt-oss-20b, with the table's tiles, by graphs with other tokens, and in bfloat16."""
    hidden = 2880
    projections = []
    for seed, (rows, inputs) in enumerate(((2 * hidden, hidden), (hidden, hidden))):
        blocks, scales = stored(32, rows, inputs, seed)
        scales -= 6
        weight = Mxfp4Weight(to_words(blocks), to_exponents(scales), torch.bfloat16, randn(32, rows, seed=seed) / 4)
        assert usable_ways(weight) == ("triton", "loop")
        assert torch.equal(weight.dequantized().weight, dequantize_mxfp4(blocks, scales, torch.bfloat16))
        projections.append(weight)
    first, second = projections
    x = randn(num_tokens, hidden, seed=3)
    ids = torch.rand(num_tokens, 32, generator=torch.Generator().manual_seed(1)).topk(4).indices.to(DEVICE)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        groups = group_tokens(ids, 32)
        order = "pairs" if num_tokens == 1 else "sorted"
        inner = grouped_linear(x, first, groups, rows="tokens", out_rows=order, activation=GPT_OSS)
        outer = grouped_linear(inner, second, groups, rows=order, out_rows="pairs", routed_before=True)
        return inner, outer

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inner, outer = run()
    for seed in (1, 2):
        ids.copy_(torch.rand(num_tokens, 32, generator=torch.Generator().manual_seed(seed)).topk(4).indices)
        x.copy_(randn(num_tokens, hidden, seed=seed))
        graph.replay()
        groups = group_tokens(ids, 32)
        sorted_inner = inner[groups.pairs.long()] if num_tokens == 1 else inner
        found = outer[groups.pairs.long()]
        offsets = groups.offsets.tolist()
        for expert in range(32):
            own = slice(offsets[expert], offsets[expert + 1])
            if own.start == own.stop:
                continue
            rows = x[groups.tokens[own].long()]
            plain = [dequantized_words(w.words[expert], w.exponents[expert], torch.float64) for w in projections]
            wanted = rows.double() @ plain[0].t() + first.bias[expert].double()
            gate, up = wanted.chunk(2, dim=-1)
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            assert_close(sorted_inner[own], gate * torch.sigmoid(1.702 * gate) * (up + 1))
            assert_close(found[own], sorted_inner[own].double() @ plain[1].t() + second.bias[expert].double())
