from __future__ import annotations

import pytest
import torch

from attention.kv_cache import KVCacheSpec, reshape_and_cache
from attention.metadata import build_metadata

SPEC = KVCacheSpec(num_layers=3, num_kv_heads=2, head_size=8, block_size=16, dtype=torch.bfloat16)


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
