"""The tiles that the benchmark of MXFP4 experts tries."""

from __future__ import annotations

import pytest

from benchmarks.moe_mxfp4 import DOWN, GATE_UP, TOKENS, candidates, describe
from workers.ops.mxfp4_tiles import mxfp4_stage_bytes


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_every_number_of_tokens_has_tiles_that_fit(num_tokens: int) -> None:
    for tiles, gated in ((GATE_UP, True), (DOWN, False)):
        tried = candidates(num_tokens, tiles)
        assert len({describe(tile) for tile in tried}) == len(tried) > 2
        assert all(tile.num_stages * mxfp4_stage_bytes(tile, gated) <= 227 << 10 for tile in tried)
        assert all(tile.inputs % 128 == 0 for tile in tried)
