"""The block masks that FLEX_ATTENTION's compiled kernel goes by; run eagerly, only its mask functions are used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.backends.flex_attention.backend import kernel_options
from attention.backends.flex_attention.plan import TILE, FlexGroup, plan_groups
from attention.spec import AttentionType
from attention_cases import Batch, Case
from attention_inputs import draw

MIXED = Batch("mixed", ((1, 33), (20, 20), (1, 150), (7, 40), (1, 1), (64, 128), (1, 64)), None)
DECODE = Batch("decode", tuple((1, n) for n in (1, 2, 16, 17, 63, 64, 65, 127, 129, 200)), None)
DECODE_ONE = Batch("decode_one", ((1, 77),), None)
ONE_TOKEN = Batch("first_token", ((1, 1),), None)
TREES = (
    Batch("tree7", ((7, 7), (7, 20), (7, 23), (7, 100)), None),
    Batch("tree1", ((1, 1), (1, 17), (1, 64)), None),
    Batch("tree33", ((33, 33), (33, 49), (33, 161)), None),
)
CUSTOM = Batch("custom", ((5, 21), (1, 33), (40, 130)), None)
SEQUENCES = Batch("sequences", ((1, 1), (5, 5), (16, 16), (64, 64), (130, 130)), None)
LONG = Batch("long", ((300, 900), (1, 257), (140, 140), (1, 1)), None)
BASE = Case(MIXED, torch.float32, num_heads=2, num_kv_heads=1, head_size=8)
CASES = [
    *(replace(BASE, batch=batch) for batch in (MIXED, DECODE, DECODE_ONE, ONE_TOKEN, LONG)),
    *(replace(BASE, batch=batch, window=window) for batch in (MIXED, LONG, DECODE) for window in (1, 100)),
    *(replace(BASE, batch=batch, mask="tree") for batch in TREES),
    replace(BASE, batch=TREES[2], mask="tree", window=20),
    replace(BASE, batch=CUSTOM, mask="custom"),
    replace(BASE, batch=SEQUENCES, attn_type=AttentionType.ENCODER_ONLY),
    replace(BASE, batch=SEQUENCES, attn_type=AttentionType.ENCODER_ONLY, window=20),
]


def visible(group: FlexGroup) -> torch.Tensor:
    """(rows of tiles, queries in a row, keys) bool, as the mask function says."""
    count, keys = group.q_end - group.q_begin, group.block_mask.seq_lengths[1]
    shape = (count, 1) if group.batched else (1, count)
    batch, query = torch.arange(shape[0])[:, None, None], torch.arange(shape[1])[None, :, None]
    return group.block_mask.mask_mod(batch, torch.tensor(0), query, torch.arange(keys)).expand(*shape, keys)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> list[int]:
    return indices[: int(counts)].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_block_masks_list_what_the_mask_function_shows(case: Case) -> None:
    for group in plan_groups(case.spec, draw(case, "cpu").common, case.block_size, 400, None):
        block_mask = group.block_mask
        assert block_mask.full_kv_num_blocks is not None
        assert block_mask.full_kv_indices is not None
        seen = visible(group)
        for row in range(seen.shape[0]):
            for tile, queries in enumerate(seen[row].split(TILE)):
                partial = listed(block_mask.kv_num_blocks[row, 0, tile], block_mask.kv_indices[row, 0, tile])
                whole = listed(block_mask.full_kv_num_blocks[row, 0, tile], block_mask.full_kv_indices[row, 0, tile])
                assert len({*partial, *whole}) == len(partial) + len(whole), "a tile of keys is listed twice"
                for block, keys in enumerate(queries.split(TILE, dim=1)):
                    if block in whole:
                        assert keys.all()
                        assert keys.shape[1] == TILE
                    elif block not in partial:
                        assert not keys.any()


def test_long_prompts_have_tiles_that_need_no_mask() -> None:
    case = replace(BASE, batch=Batch("prompt", ((512, 1024),), None))
    (group,) = plan_groups(case.spec, draw(case, "cpu").common, case.block_size, 4096, None)
    assert group.block_mask.full_kv_num_blocks is not None
    assert group.block_mask.full_kv_num_blocks.flatten().tolist() == [4, 5, 6, 7]
    assert group.block_mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]


def test_groups_bound_what_is_gathered() -> None:
    lens = ((1, 100), (1, 100), (1, 250), (1, 30), (1, 30), (1, 30))
    case = replace(BASE, batch=Batch("many", lens, None))
    groups = plan_groups(case.spec, draw(case, "cpu").common, case.block_size, 200, None)
    assert [(group.q_begin, group.q_end) for group in groups] == [(0, 2), (2, 3), (3, 6)]
    assert [len(group.rows) for group in groups if group.rows is not None] == [200, 250, 90]


def test_a_window_gathers_what_it_shows() -> None:
    case = replace(BASE, batch=Batch("window", ((1, 1000), (5, 1000)), None), window=10)
    (group,) = plan_groups(case.spec, draw(case, "cpu").common, case.block_size, 200, None)
    assert group.rows is not None
    assert len(group.rows) == 10 + 14


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [16, 40, 96, 192, 256, 512])
def test_a_kernels_tiles_fit_the_shared_memory(dtype: torch.dtype, head_size: int, batched: bool) -> None:
    options = kernel_options(dtype, head_size, batched)
    padded = 1 << (head_size - 1).bit_length()
    held = options["BLOCK_M"] + 2 * options["num_stages"] * options["BLOCK_N"]
    assert held * padded * dtype.itemsize <= 99 << 10  # the least of any GPU from SM 8.0 on
    assert options["BLOCK_M"] >= 16
    assert options["BLOCK_N"] >= 16
    assert ("FLOAT32_PRECISION" in options) == (dtype is torch.float32)
