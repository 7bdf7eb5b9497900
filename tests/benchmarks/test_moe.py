"""What `benchmarks.moe` tries: something for every number of tokens, and on a CPU the same numbers as the layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from benchmarks.environment import RESULTS
from benchmarks.moe import TOKENS
from benchmarks.moe_layers import LAYERS, MoELayerShape, all_tiles, candidates, describe, fitting, make_block, run_block
from workers.ops.flashinfer_experts import interleave
from workers.ops.grouped_tiles import SM90, SM90_SHAPES, TILES, choose_tile
from workers.ops.router_config import RouterConfig
from workers.ops.sum_tiles import USUAL, sums_faster

H200_SHARED_MEMORY = 232448


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_every_point_has_candidates_that_fit(name: str, num_tokens: int) -> None:
    found = candidates(LAYERS[name], num_tokens)
    assert found
    for firsts, seconds in found:
        assert len({tile.rows for tile in (*firsts, *seconds)}) == 1
        assert any(fitting(tile, True, H200_SHARED_MEMORY) for tile in firsts)
        assert any(fitting(tile, False, H200_SHARED_MEMORY) for tile in seconds)


@pytest.mark.parametrize("tokens", [TOKENS, (256,)])
@pytest.mark.parametrize("name", LAYERS)
def test_every_candidate_is_compiled_before_and_has_a_name_of_its_own(name: str, tokens: tuple[int, ...]) -> None:
    compiled = all_tiles(LAYERS[name], tokens)
    for side in (0, 1):
        wanted = {tile for n in tokens for pair in candidates(LAYERS[name], n) for tile in pair[side]}
        assert wanted == {pair[side] for pair in compiled}
        assert len({describe(tile) for tile in wanted}) == len(wanted)


def tabled(layer: MoELayerShape, num_tokens: int) -> tuple[str, str]:
    """The tiles that such a layer runs with on an H200, as the measured ones are named."""
    shapes = (
        (layer.num_experts, 2 * layer.intermediate_size, layer.hidden_size, True),
        (layer.num_experts, layer.hidden_size, layer.intermediate_size, False),
    )
    first, second = (
        choose_tile(num_tokens * layer.top_k, shape, torch.bfloat16, "sm90", H200_SHARED_MEMORY) for shape in shapes
    )
    assert first.rows == second.rows, "pairs are cut into tiles once"
    summed = num_tokens == 1 and sums_faster(layer.hidden_size, layer.top_k)
    return describe(first), describe(USUAL if summed else second)


def expected_us(measured: Mapping[tuple[str, str], float], first: str, second: str) -> float:
    """Of a pair that may not have been measured as one: each first tile was beside one second tile, and the fastest
    first tile beside every second."""
    rows = first.partition("x")[0].partition("-")[2]
    pairs = [pair for pair in measured if pair[0].partition("x")[0].partition("-")[2] == rows]
    best = Counter(pair[0] for pair in pairs).most_common(1)[0][0]
    usual = Counter(pair[1] for pair in pairs).most_common(1)[0][0]
    return measured[first, usual] + measured[best, second] - measured[best, usual]


@pytest.mark.parametrize("name", LAYERS)
def test_the_table_has_what_was_fastest_when_measured(name: str) -> None:
    """The first run tried no tile of `tma_rows`: where the table has one, another point has to have been won by it."""
    content = json.loads((RESULTS / "moe_h200.json").read_text())
    second_run = content["config"]["second_run"]["tokens"]
    compared, of_other_points = set(), set()
    for point in content["layers"][name]:
        assert not point["errors"]
        num_tokens, tiles = point["tokens"], tabled(LAYERS[name], point["tokens"])
        assert any("tma-" in tried for tried in point["us"]) == (num_tokens in second_run)
        if num_tokens not in second_run and any(tile.startswith("tma-") for tile in tiles):
            of_other_points.add(tiles)
            continue
        pairs = {tuple(tried.split()): us for tried, us in point["us"].items() if tried.count(" ") == 1}
        found = expected_us(pairs, *tiles)
        assert found <= 1.03 * min(pairs.values()), num_tokens
        assert found <= point["us"].get("torch", found)
        compared.add(tiles)
    assert of_other_points <= compared


def test_both_products_of_a_layer_have_the_same_rows() -> None:
    """At every boundary of any range, in every shape: pairs are cut into tiles once."""
    ranges = [*SM90.values(), *SM90_SHAPES.values()]
    for layer in (*LAYERS.values(), MoELayerShape(RouterConfig(160, 1), 1000, 1000)):
        for begin in {begin for each in ranges for begin, _ in each}:
            for mean in (begin, begin * 0.99):
                tabled(layer, max(1, round(mean * layer.num_experts / layer.top_k)))


def test_shapes_that_were_not_measured_have_the_usual_tiles() -> None:
    for gated in (True, False):
        ranges = SM90[gated]
        assert [begin for begin, _ in ranges] == sorted({begin for begin, _ in ranges})
        for begin, tile in ranges:
            num_pairs = max(1, round(begin * 160 + 0.5))
            shape = (160, 1000, 1000, gated)
            assert choose_tile(num_pairs, shape, torch.bfloat16, "sm90", H200_SHARED_MEMORY) == tile
    other = choose_tile(16, (160, 1000, 1000, True), torch.bfloat16, "sm80", H200_SHARED_MEMORY)
    assert other == TILES[0][1], "of other devices nothing was measured"


def test_a_measured_block_computes_what_the_layer_does() -> None:
    shape = MoELayerShape(RouterConfig(6, 2), 32, 16, num_shared=2)
    block = make_block(shape, torch.device("cpu"))
    for num_tokens in (1, 9):
        x = torch.randn(num_tokens, 32).bfloat16()
        assert torch.equal(run_block(block, x, way="loop"), block(x))


def test_gate_and_up_take_turns_for_flashinfer() -> None:
    gate, up = torch.arange(64), torch.arange(64) + 100
    rows = interleave(torch.cat([gate, up])[None, :, None].float())[0, :, 0].int()
    assert rows.tolist() == [*range(100, 132), *range(32), *range(132, 164), *range(32, 64)]
