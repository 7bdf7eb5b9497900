"""Contexts longer than what CPU_ATTN gathers at a time, and written-out scores of several tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.backends.torch_sdpa.tiles import MASKED_ROWS, Band, Reach, masked_tiles, scored_tiles
from attention.metadata import build_metadata
from attention.selection.registry import get_backend
from attention.spec import FP8, AttentionSpec
from attention_reference import attend
from long_tails import slow_unless
from paged_case import paged_case, shuffled_tables

WIDE = AttentionSpec(8, 8, 256, 1 / 16)
"""So many bytes a token that a piece holds 256 of float32."""
LENS = ((1, 700), (1, 20), (1, 513), (90, 700), (300, 300), (3, 270), (1, 257))
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 280},
    "narrow": {"sliding_window": 9},
    "sinks": {"has_sinks": True},
    "fp8": {"kv_cache_dtype": FP8},
    "cap": {"logits_soft_cap": 2.0},
    "alibi": {"alibi_slopes": tuple(2.0**-i for i in range(8))},
    "all": {
        "sliding_window": 280,
        "has_sinks": True,
        "kv_cache_dtype": FP8,
        "logits_soft_cap": 2.0,
        "alibi_slopes": tuple(2.0**-i for i in range(8)),
    },
}


@pytest.mark.parametrize("lens", [LENS, ((1, 700),)], ids=["mixed", "one"])
@pytest.mark.parametrize(
    "features",
    slow_unless(
        lambda param: param.id in ("plain", "narrow", "all"),
        [pytest.param(features, id=name) for name, features in FEATURES.items()],
    ),
)
@pytest.mark.parametrize("name", ["CPU_ATTN", "TORCH_SDPA"])
def test_pieces_merge(name: str, features: dict[str, object], lens: tuple[tuple[int, int], ...]) -> None:
    spec = replace(WIDE, **features)
    case = paged_case(spec, lens)
    poisoned = torch.full_like(case.query, float("nan"), memory_format=torch.contiguous_format)
    written = case.run(get_backend(name), poisoned)
    torch.testing.assert_close(written.double(), case.expected, rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(case.run(get_backend(name)), written, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (16, 8)], ids=["mha", "gqa"])
def test_pieces_merge_in_half_precision(heads: tuple[int, int], dtype: torch.dtype) -> None:
    case = paged_case(replace(WIDE, num_heads=heads[0]), ((1, 1300), (30, 1100)), dtype=dtype)
    answered = case.run(get_backend("CPU_ATTN"))
    assert answered.dtype == dtype
    torch.testing.assert_close(answered.double(), case.expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_no_more_than_a_piece_is_gathered_at_a_time(features: dict[str, object], dtype: torch.dtype) -> None:
    """Of keys and values together 4 MiB at most, whatever the contexts' lengths are."""
    spec = replace(WIDE, **features)
    builder = get_backend("CPU_ATTN").builder_class(spec, dtype, 16, torch.device("cpu"))
    lens = ((1, 9000), (700, 9000), (2000, 2000), *((1, 300),) * 20)
    tables = shuffled_tables([context for _, context in lens], 16)
    planned = builder.build(build_metadata([q for q, _ in lens], [c for _, c in lens], tables, 16))
    pieces = [piece for work in planned.works for piece in work.pieces]
    gathered = [piece.rows.shape[0] for piece in pieces if piece.rows is not None]
    assert max(gathered) * 8 * 256 * dtype.itemsize <= 4 << 20
    if spec.sliding_window is None:
        assert len(gathered) > 9000 * 2 // max(gathered)


@pytest.mark.parametrize("name", ["CPU_ATTN", "TORCH_SDPA"])
def test_custom_masks_of_several_tiles(name: str) -> None:
    """Rows that see nothing in some tiles, or nothing at all, among others."""
    spec = AttentionSpec(4, 2, 32, 32**-0.5)
    case = paged_case(spec, ((200, 1100),))
    case.run(get_backend(name))  # stores the batch's own tokens
    mask = torch.rand(200, 1100, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[3] = False
    mask[5, :1000] = False
    mask[150, 20:] = False
    rows = case.common.block_tables[0].long()
    keys, values = (case.cache[rows, half].flatten(0, 1)[:1100] for half in (0, 1))
    masked = replace(case, common=replace(case.common, custom_mask=mask.flatten()))
    answered = masked.run(get_backend(name))
    expected = attend(case.query, keys, values, spec, mask)
    torch.testing.assert_close(answered.double(), expected, rtol=2e-5, atol=2e-5)
    assert not answered[3].any()


@pytest.mark.parametrize("name", ["CPU_ATTN", "TORCH_SDPA"])
def test_keys_that_are_in_the_cache_already(name: str) -> None:
    """A layer that shares another's cache brings no keys, whole prompts included."""
    backend = get_backend(name)
    case = paged_case(WIDE, LENS)
    case.run(backend)
    builder = backend.builder_class(case.spec, torch.float32, 16, torch.device("cpu"))
    answered = backend.impl_class(case.spec).forward(case.query, None, None, case.cache, builder.build(case.common))
    torch.testing.assert_close(answered.double(), case.expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("back", [None, 0, 5, 40, 300])
@pytest.mark.parametrize("ahead", [None, 0, 5, 300])
@pytest.mark.parametrize("keys", [range(90), range(90, 700), range(700), range(400, 450), range(695, 700)])
@pytest.mark.parametrize("queries", [range(90, 700), range(695, 700), range(700)])
def test_tiles_cover_what_is_seen_once_and_nothing_else(
    back: int | None, ahead: int | None, keys: range, queries: range
) -> None:
    reach = Reach(back, ahead)
    q, k = (torch.arange(positions.start, positions.stop) for positions in (queries, keys))
    distance = k - q[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= distance >= -back if back is not None else seen
    seen &= distance <= ahead if ahead is not None else seen
    covered = torch.zeros(distance.shape)
    band = Band(reach, 700, torch.device("cpu"), additive=False)
    for tile in masked_tiles(queries, keys, reach, band):
        shape = tile.q_end - tile.q_begin, tile.k_end - tile.k_begin
        if tile.mask is not None:
            assert shape[0] <= MASKED_ROWS
            assert tile.mask.any(-1).all(), "a row without a visible key has no softmax"
        visible = tile.mask if tile.mask is not None else torch.ones(shape, dtype=torch.bool)
        if tile.causal:
            assert shape[0] == shape[1]
            visible = visible.tril()
        assert tile.behind == int(q[tile.q_begin] - k[tile.k_begin])
        covered[tile.q_begin : tile.q_end, tile.k_begin : tile.k_end] += visible
    assert torch.equal(covered, seen.float())
    reached = torch.zeros(distance.shape)
    for tile in scored_tiles(queries, keys, reach, None):
        reached[tile.q_begin : tile.q_end, tile.k_begin : tile.k_end] += 1
    assert reached.max() <= 1
    assert (reached >= seen.float()).all()
