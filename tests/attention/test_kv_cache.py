from __future__ import annotations

import pytest
import torch

from attention.backend import KVScales
from attention.errors import AttentionInputError
from attention.fp8 import FP8_MAX, calibrate
from attention.kv_cache import KVCacheSpec, reshape_and_cache
from attention.metadata import build_encoder_metadata, build_metadata
from attention.spec import FP8, Feature

SPEC = KVCacheSpec(layers=(0, 1, 2), num_kv_heads=2, head_size=8, block_size=16, dtype=torch.bfloat16)


def test_sizes() -> None:
    assert SPEC.bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert SPEC.bytes_per_block == 16 * SPEC.bytes_per_token
    assert SPEC.blocks_that_fit(10 * SPEC.bytes_per_block) == 10
    assert SPEC.blocks_that_fit(10 * SPEC.bytes_per_block - 1) == 9
    assert SPEC.blocks_that_fit(-1) == 0


def test_allocation_is_one_contiguous_tensor_of_the_stated_size() -> None:
    cache = SPEC.allocate(5, "cpu")
    assert cache.shape == (3, 5, 2, 16, 2, 8)
    assert cache.is_contiguous()
    assert cache.nbytes == 5 * SPEC.bytes_per_block
    assert cache[2].is_contiguous()
    assert cache[2].data_ptr() - cache.data_ptr() == cache.nbytes * 2 // 3


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        SPEC.allocate(0, "cpu")


def test_reshape_and_cache_scatters_into_slots() -> None:
    cache = SPEC.allocate(4, "cpu")[0]
    key, value = torch.randn(2, 5, 2, 8).to(torch.bfloat16).unbind(0)
    slots = torch.tensor([63, 0, 17, 15, 32])
    reshape_and_cache(key, value, cache, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(cache[slot // 16, 0, slot % 16], key[token])
        assert torch.equal(cache[slot // 16, 1, slot % 16], value[token])
    assert int((cache != 0).any(-1).any(-1).sum()) == 10


def test_metadata_describes_the_batch() -> None:
    metadata = build_metadata([3, 1], [18, 5], [[7, 2, 9], [4]], block_size=16)
    assert metadata.cu_seqlens_q.tolist() == [0, 3, 4]
    assert metadata.seq_lens.tolist() == [18, 5]
    assert metadata.block_tables.tolist() == [[7, 2], [4, 0]]
    assert metadata.slot_mapping.tolist() == [7 * 16 + 15, 2 * 16, 2 * 16 + 1, 4 * 16 + 4]
    assert not metadata.decode_only
    assert build_metadata([1, 1], [18, 5], [[7, 2], [4]], 16).decode_only


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "tables"),
    [([0], [4], [[1]]), ([5], [4], [[1]]), ([1], [17], [[1]]), ([1, 1], [4], [[1]])],
)
def test_impossible_batches_are_refused(
    query_lens: list[int], context_lens: list[int], tables: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match=r"blocks|block tables"):
        build_metadata(query_lens, context_lens, tables, block_size=16)


def test_an_fp8_cache_holds_what_is_divided_by_the_scale_and_clamped() -> None:
    cache = KVCacheSpec((0,), 2, 8, 4, FP8).allocate(3, "cpu")[0]
    key, value = torch.randn(2, 2, 2, 8).unbind(0)
    key[0, 0, 0] = 1e6
    slots = torch.tensor([9, 2])
    reshape_and_cache(key, value, cache, slots, KVScales(0.5, 2.0))
    assert cache[2, 0, 1, 0, 0].float() == FP8_MAX
    stored = torch.stack([cache[slot // 4, :, slot % 4] for slot in slots.tolist()]).float()
    torch.testing.assert_close(stored[:, 0] * 0.5, key.clamp(max=FP8_MAX * 0.5), rtol=2**-4, atol=2**-10)
    torch.testing.assert_close(stored[:, 1] * 2.0, value, rtol=2**-4, atol=2**-8)
    assert int((cache.view(torch.uint8) != 0).any(-1).any(-1).sum()) == 4


def test_calibrated_scales_bring_the_largest_number_to_the_edge() -> None:
    key, value = torch.randn(2, 30, 2, 8).unbind(0)
    scales = calibrate(key, value)
    assert scales.k * FP8_MAX == pytest.approx(key.abs().max().item())
    assert scales.v * FP8_MAX == pytest.approx(value.abs().max().item())
    assert calibrate(torch.zeros(1, 1, 1), torch.full((1, 1, 1), float("inf"))) == KVScales()


def test_metadata_of_an_encoder_has_no_cache() -> None:
    metadata = build_encoder_metadata([3, 1, 5])
    assert metadata.cu_seqlens_q.tolist() == [0, 3, 4, 9]
    assert metadata.seq_lens.tolist() == [3, 1, 5]
    assert metadata.block_tables.shape == (3, 0)
    assert metadata.slot_mapping.shape == (0,)
    assert metadata.max_query_len == metadata.max_seq_len == 5
    with pytest.raises(AttentionInputError, match="at least 1 token, not 0"):
        build_encoder_metadata([3, 0])


def test_masks_are_features_and_must_fit() -> None:
    tree = torch.eye(2, dtype=torch.bool)
    assert build_metadata([2, 2], [9, 2], [[1], [2]], 16, tree_mask=tree).features == {Feature.TREE_MASK}
    custom = torch.ones(2 * 9 + 1 * 2, dtype=torch.bool)
    assert build_metadata([2, 1], [9, 2], [[1], [2]], 16, custom_mask=custom).features == {Feature.CUSTOM_MASK}
    with pytest.raises(AttentionInputError, match=r"tree mask of shape \(2, 2\) for queries of \[1, 2\]"):
        build_metadata([2, 1], [9, 2], [[1], [2]], 16, tree_mask=tree)
    with pytest.raises(AttentionInputError, match=r"custom mask of shape \(20,\), expected \(22,\)"):
        build_metadata([2, 2], [9, 2], [[1], [2]], 16, custom_mask=custom)
    with pytest.raises(AttentionInputError, match="not both"):
        build_metadata([2], [2], [[1]], 16, tree_mask=tree, custom_mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(("length", "tables"), [(8, [[1, 2], [1, 3]]), (32, [[1, 2], [1, 3]]), (16, [[4, 2], [1, 3]])])
def test_a_common_prefix_is_whole_blocks_that_all_have(length: int, tables: list[list[int]]) -> None:
    with pytest.raises(AttentionInputError, match=r"prefix|not the same"):
        build_metadata([1, 1], [20, 30], tables, 16, common_prefix_len=length)
    assert build_metadata([1, 1], [20, 30], [[1, 2], [1, 3]], 16, common_prefix_len=16).common_prefix_len == 16
