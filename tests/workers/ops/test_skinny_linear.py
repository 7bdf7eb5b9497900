"""Matrix products of a few rows: the kernel against its plain torch twin and float64, on a GPU or interpreted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from workers.layers.context import LayerContext
from workers.layers.gated_mlp import GatedMLP
from workers.layers.linear import Linear
from workers.layers.linear_methods.choice import linear_method_for
from workers.layers.lm_head import LMHead
from workers.layers.norm import RMSNorm
from workers.layers.residual import ResidualStream
from workers.ops.skinny_linear import (
    skinny_gated_linear,
    skinny_gated_linear_torch,
    skinny_linear,
    skinny_linear_torch,
    skinny_split_linear,
    skinny_split_linear_torch,
)
from workers.ops.skinny_tiles import MAX_ROWS, ROWS, SM90, SM90_SPLIT, SkinnyTile, fits, skinny_tile, split_tile
from workers.ops.weighted_sum import summed
from workers.parallel.group import SINGLE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = SkinnyTile(features=16, inputs=64, num_stages=2, num_warps=2, prefetched=128)
SPLIT = replace(TILE, splits=3)
MEASURED = [
    *((shape, tile) for shape, tiles in SM90.items() for tile in tiles.values()),
    *(((*shape, False), tile) for shape, tiles in SM90_SPLIT.items() for tile in tiles.values()),
]
NAN = float("nan")

needs_hopper = pytest.mark.skipif(
    skinny_tile(1, 4096, 4096, torch.bfloat16, DEVICE) is None, reason="needs a Hopper GPU of 132 multiprocessors"
)


@pytest.fixture(scope="module")
def launch() -> Callable[..., None]:
    """The launch function, of a kernel that the interpreter runs where there is no GPU."""
    with mock.patch.dict(os.environ, {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}):
        language = pytest.importorskip("triton.language")
        from workers.ops.triton import skinny_linear
    for function in (language.sum, skinny_linear.skinny_linear_kernel):
        if DEVICE.type == "cpu" and type(function).__name__ != "InterpretedFunction":
            pytest.skip("Triton was imported to compile: needs TRITON_INTERPRET=1 or a CUDA device")
    return skinny_linear.launch_skinny_linear


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, num_inputs: int) -> None:
    """`exact` is float64; float32 sums err by some units of the largest, and the result is rounded to its dtype.

    The interpreter rounds to bfloat16 towards zero: one unit instead of a half.
    """
    unit = torch.finfo(actual.dtype).eps * (1.0 if DEVICE.type == "cpu" else 0.51)
    allowed = unit * exact.abs() + num_inputs * torch.finfo(torch.float32).eps * (1.0 + exact.abs().max()) + 1e-7
    assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "room"), [(1, 16), (3, 16), (16, 16), (17, 32), (61, 64)])
def test_kernel_is_its_twin_and_rounds_once(
    launch: Callable[..., None], num_rows: int, room: int, dtype: torch.dtype
) -> None:
    x, weight = randn(num_rows, 192, dtype=dtype), randn(48, 192, dtype=dtype, seed=1)
    out = torch.full((num_rows, 48), NAN, dtype=dtype, device=DEVICE)
    launch(out, x, weight, replace(TILE, rows=room))
    exact = x.double() @ weight.double().t()
    assert_rounded_once(out, exact, 192)
    assert_rounded_once(skinny_linear_torch(x, weight), exact, 192)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_residual_are_added_before_rounding(
    launch: Callable[..., None], with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight = randn(5, 128, dtype=dtype), randn(32, 128, dtype=dtype, seed=1)
    bias = randn(32, dtype=dtype, seed=2) if with_bias else None
    residual = randn(5, 32, dtype=dtype, seed=3) * 8
    exact = x.double() @ weight.double().t() + residual.double() + (0.0 if bias is None else bias.double())
    assert_rounded_once(skinny_linear_torch(x, weight, bias=bias, residual=residual), exact, 128)
    launch(residual, x, weight, TILE, bias=bias, residual=residual)  # in place
    assert_rounded_once(residual, exact, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "room"), [(5, 16), (33, 64)])
def test_parts_of_the_inputs_sum_up_to_the_product(
    launch: Callable[..., None], num_rows: int, room: int, with_bias: bool, dtype: torch.dtype
) -> None:
    """Each part is float32, and nothing is rounded before the sum: a residual is added to all of it."""
    x, weight, tile = randn(num_rows, 384, dtype=dtype), randn(32, 384, dtype=dtype, seed=1), replace(SPLIT, rows=room)
    bias = randn(32, dtype=dtype, seed=2) if with_bias else None
    rows = torch.full((num_rows * 3, 32), NAN, device=DEVICE)
    launch(rows, x, weight, tile, bias=bias)
    twin = skinny_split_linear_torch(x, weight, tile, bias)
    assert twin.top_k == 3
    for share in range(3):
        columns = slice(128 * share, 128 * share + 128)
        exact = x[:, columns].double() @ weight[:, columns].double().t()
        exact += 0.0 if share or bias is None else bias.double()
        assert_rounded_once(rows[share::3], exact, 128)
        assert_rounded_once(twin.rows[share::3], exact, 128)
    stream = ResidualStream(torch.full((num_rows, 32), 3.0, dtype=dtype, device=DEVICE))
    stream.add(skinny_split_linear(x, weight, tile, bias))
    exact = x.double() @ weight.double().t() + 3.0 + (0.0 if bias is None else bias.double())
    assert summed(twin).dtype == torch.float32
    assert_rounded_once(stream.value, exact, 384)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_become_one_result(launch: Callable[..., None], dtype: torch.dtype) -> None:
    x, weight = randn(4, 128, dtype=dtype) * 0.3, randn(96, 128, dtype=dtype, seed=1)
    out = torch.full((4, 48), NAN, dtype=dtype, device=DEVICE)
    launch(out, x, weight, TILE, gated=True)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    assert_rounded_once(out, F.silu(gate) * up, 128)
    assert_rounded_once(skinny_gated_linear_torch(x, weight), F.silu(gate) * up, 128)


def test_rows_of_wider_tensors_and_nothing_else_is_touched(launch: Callable[..., None]) -> None:
    wide_x, wide_out, weight = randn(6, 200)[1:5], torch.full((6, 70), 7.0, device=DEVICE), randn(32, 128, seed=1)
    residual = randn(4, 80, seed=2)[:, 16:48]
    x, out = wide_x[:, 64:192], wide_out[1:5, 16:48]
    launch(out, x, weight, TILE, residual=residual)
    torch.testing.assert_close(out, x @ weight.t() + residual, rtol=1e-5, atol=1e-5)
    out.fill_(7.0)
    assert (wide_out == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(launch: Callable[..., None], dtype: torch.dtype) -> None:
    x, weight = randn(ROWS[0], 192, dtype=dtype), randn(64, 192, dtype=dtype, seed=1)
    x[11] = NAN
    together = torch.empty(ROWS[0], 64, dtype=dtype, device=DEVICE)
    launch(together, x, weight, TILE)
    for rows in (slice(0, 1), slice(3, 8), slice(15, 16)):
        alone = torch.empty(rows.stop - rows.start, 64, dtype=dtype, device=DEVICE)
        launch(alone, x[rows], weight, TILE)
        assert torch.equal(alone, together[rows])
    assert together[11].isnan().all()
    assert together.isnan().sum() == 64


def test_no_rows_are_no_work(launch: Callable[..., None]) -> None:
    x, weight = torch.empty(0, 64, device=DEVICE), randn(32, 64)
    launch(torch.empty(0, 32, device=DEVICE), x, weight, TILE)
    assert skinny_linear(x, weight, TILE).shape == (0, 32)
    assert skinny_gated_linear(x, weight, TILE).shape == (0, 16)


def test_dispatch_writes_where_it_is_told() -> None:
    x, weight, bias = randn(3, 64), randn(32, 64, seed=1), randn(32, seed=2)
    residual = randn(3, 32, seed=3)
    expected = F.linear(x, weight, bias) + residual
    assert skinny_linear(x, weight, TILE, bias=bias, residual=residual, out=residual) is residual
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)
    out = torch.empty(3, 16, device=DEVICE)
    assert skinny_gated_linear(x, weight, TILE, out) is out
    torch.testing.assert_close(out, skinny_gated_linear_torch(x, weight), rtol=1e-5, atol=1e-5)


_X, _WEIGHT = torch.zeros(2, 64), torch.zeros(32, 64)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: skinny_linear(torch.zeros(17, 64), _WEIGHT, TILE), "at most 16"),
        (lambda: skinny_linear(torch.zeros(33, 64), _WEIGHT, replace(TILE, rows=32)), "at most 32"),
        (lambda: skinny_linear(torch.zeros(2, 192), torch.zeros(32, 192), SPLIT), "leaves 3 summands"),
        (lambda: skinny_split_linear(_X, _WEIGHT, SPLIT), "of 64 inputs"),
        (lambda: skinny_split_linear(_X, _WEIGHT, TILE, torch.zeros(31)), "bias of"),
        (lambda: skinny_linear(torch.zeros(64, 2).t(), _WEIGHT, TILE), "x of shape"),
        (lambda: skinny_linear(_X, _WEIGHT.half(), TILE), "weight of torch.float16"),
        (lambda: skinny_linear(_X, torch.zeros(64, 32).t(), TILE), "weight of"),
        (lambda: skinny_linear(_X, torch.zeros(32, 128), TILE), "weight of"),
        (lambda: skinny_linear(_X, torch.zeros(24, 64), TILE), "does not divide 24 features"),
        (lambda: skinny_linear(torch.zeros(2, 32), torch.zeros(32, 32), TILE), "of 32 inputs"),
        (lambda: skinny_linear(_X, _WEIGHT, TILE, bias=torch.zeros(31)), "bias of"),
        (lambda: skinny_linear(_X, _WEIGHT, TILE, residual=torch.zeros(2, 31)), "residual of"),
        (lambda: skinny_linear(_X, _WEIGHT, TILE, out=torch.zeros(2, 32).half()), "out of torch.float16"),
        (lambda: skinny_gated_linear(_X, torch.zeros(33, 64), TILE), "as many rows of gate"),
        (lambda: skinny_gated_linear(_X, _WEIGHT, TILE, out=torch.zeros(2, 32)), "out of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_other_devices_keep_their_own_library() -> None:
    assert skinny_tile(1, 4096, 4096, torch.bfloat16, torch.device("cpu")) is None
    assert split_tile(64, 4096, 4096, torch.bfloat16, torch.device("cpu")) is None


@pytest.mark.parametrize(("shape", "tile"), MEASURED)
def test_every_measured_tile_divides_its_shape_and_fits_the_device(
    shape: tuple[int, int, bool], tile: SkinnyTile
) -> None:
    num_features, num_inputs, gated = shape
    assert fits(tile, num_features, num_inputs, gated)
    rows = tile.features * (2 if gated else 1)
    assert tile.num_stages * (rows + tile.rows) * tile.inputs * 2 <= 227 << 10


def test_tables_name_tiles_by_the_rows_that_they_have_room_for() -> None:
    for table in (SM90, SM90_SPLIT):
        assert all(rows == tile.rows in ROWS for tiles in table.values() for rows, tile in tiles.items())
    assert all(tile.splits == 1 for tiles in SM90.values() for tile in tiles.values())


@needs_hopper
@pytest.mark.parametrize(
    ("args", "used"),
    [
        ((1, 4096, 4096, torch.bfloat16), True),
        ((ROWS[0], 4096, 4096, torch.float16), True),
        ((ROWS[0] + 1, 4096, 4096, torch.bfloat16), False),
        ((MAX_ROWS + 1, 4096, 4096, torch.bfloat16), False),
        ((0, 4096, 4096, torch.bfloat16), False),
        ((1, 4096, 4096, torch.float32), False),
        ((1, 4096, 4096 + 8, torch.bfloat16), False),
        ((1, 4096 + 8, 4096, torch.bfloat16), False),
        ((1, 64, 64, torch.bfloat16), False),
    ],
)
def test_the_rule_on_a_hopper_gpu(args: tuple[int, int, int, torch.dtype], used: bool) -> None:
    tile = skinny_tile(*args, DEVICE)
    assert (tile is not None) == used
    assert tile is None or fits(tile, *args[1:3])


@needs_hopper
@pytest.mark.parametrize(("shape", "tile"), MEASURED)
def test_every_measured_tile_multiplies(shape: tuple[int, int, bool], tile: SkinnyTile) -> None:
    num_features, num_inputs, gated = shape
    num_rows = tile.rows - 3
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.empty(num_features, num_inputs, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    x = randn(num_rows, num_inputs, dtype=torch.bfloat16) / num_inputs**0.5
    exact = torch.cat([x.double() @ rows.double().t() for rows in weight.split(8192)], dim=1)
    if gated:
        gate, up = exact.chunk(2, dim=-1)
        assert_rounded_once(skinny_gated_linear(x, weight, tile), F.silu(gate) * up, num_inputs)
    elif tile.splits > 1:
        assert_rounded_once(summed(skinny_split_linear(x, weight, tile)), exact, num_inputs)
    else:
        assert_rounded_once(skinny_linear(x, weight, tile), exact, num_inputs)


@needs_hopper
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_a_model_run_it_for_few_rows(bias: bool, dtype: torch.dtype) -> None:
    """Every row of few is the same as that row of many, to rounding, and the same whatever is beside it."""
    hidden, inner = 4096, 14336
    context = LayerContext(dtype, DEVICE, SINGLE, linear_method_for(DEVICE))
    mlp = GatedMLP(hidden, inner, context)
    linear = Linear(hidden, 6144, bias, context)
    norm = RMSNorm(hidden, 1e-5, context)
    for seed, parameter in enumerate([*mlp.parameters(), *linear.parameters(), *norm.parameters()]):
        parameter.normal_(0.0, 0.02, generator=torch.Generator(DEVICE).manual_seed(seed))
    assert skinny_tile(4, 6144, hidden, dtype, DEVICE) is not None
    assert skinny_tile(4, 2 * inner, hidden, dtype, DEVICE, gated=True) is not None
    assert split_tile(64, hidden, inner, dtype, DEVICE) is not None
    x, residual = randn(80, hidden, dtype=dtype, seed=90), randn(80, hidden, dtype=dtype, seed=91)

    def results(count: int) -> tuple[torch.Tensor, ...]:
        stream = ResidualStream(residual[:count].clone())
        stream.add_product(mlp.down_proj, mlp.inner(x[:count]))
        normalized = stream.normalized(norm)
        return linear(x[:count]), stream.value, normalized

    many, several, few, one = results(80), results(64), results(13), results(1)
    for a, b, c, d in zip(many, several, few, one, strict=True):
        for count, rows in ((64, b), (13, c)):
            error = (rows.float() - a[:count].float()).square().mean().sqrt()
            assert error < 0.01 * a.float().std()
        assert torch.equal(c[:1], d)


@needs_hopper
def test_logits_of_few_rows() -> None:
    context = LayerContext(torch.bfloat16, DEVICE, SINGLE, linear_method_for(DEVICE))
    rows, hidden = (randn(n, 4096, dtype=torch.bfloat16, seed=n) for n in (1024, 5))
    embeddings, out = rows.repeat(126, 1)[:128256], torch.empty(5, 128256, dtype=torch.bfloat16, device=DEVICE)
    head = LMHead(128256, 4096, embeddings, context)
    assert head(hidden, out) is out
    assert torch.equal(out, head(hidden))
    assert_rounded_once(out, (hidden.double() @ rows.double().t()).repeat(1, 126)[:, :128256], 4096)


@needs_hopper
def test_a_captured_chain_of_products_gives_what_single_calls_give() -> None:
    """Dependent launches overlap; each must still see all that the one before wrote."""
    weights = [randn(4096, 4096, dtype=torch.bfloat16, seed=i) / 64 for i in range(8)]
    x = randn(7, 4096, dtype=torch.bfloat16, seed=99)
    tile = skinny_tile(7, 4096, 4096, torch.bfloat16, DEVICE)
    assert tile is not None

    def chain() -> torch.Tensor:
        out = x
        for weight in weights:
            out = skinny_linear(out, weight, tile)
        return out

    expected = x
    for weight in weights:
        expected = skinny_linear(expected, weight, tile)
        torch.cuda.synchronize()
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(50):
        out.fill_(NAN)
        graph.replay()
        assert torch.equal(out, expected)
