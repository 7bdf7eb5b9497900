"""What `benchmarks.moe` tries: something for every number of tokens, and on a CPU the same numbers as the layer."""

from __future__ import annotations

import pytest
import torch

from benchmarks.moe import TOKENS
from benchmarks.moe_layers import LAYERS, MoELayerShape, all_tiles, candidates, describe, fitting, make_block, run_block
from workers.ops.flashinfer_experts import interleave
from workers.ops.router_config import RouterConfig

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


def test_every_candidate_is_compiled_before_and_has_a_name_of_its_own() -> None:
    compiled = all_tiles()
    for side in (0, 1):
        wanted = {
            tile for shape in LAYERS.values() for n in TOKENS for pair in candidates(shape, n) for tile in pair[side]
        }
        assert wanted <= {pair[side] for pair in compiled}
        assert len({describe(tile) for tile in wanted}) == len(wanted)


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
