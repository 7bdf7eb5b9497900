"""Kernels find tokens beyond 2^31 elements, and refuse what they would look for in the wrong place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attention.errors import AttentionInputError
from attention.kv_cache import reshape_and_cache as reshape_and_cache_in_torch
from attention.ops.torch_attention import gather
from attention.ops.triton.decode import paged_decode
from attention.ops.triton.launch import INTERPRETED
from attention.ops.triton.merge_attn_states import merge_attn_states
from attention.ops.triton.prefill import paged_prefill, varlen_prefill
from attention.ops.triton.reshape_and_cache import reshape_and_cache
from attention.spec import FP8, AttentionSpec
from attention_reference import attend, visible_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, BLOCK, SIZE = 2, 16, 32
SPEC = AttentionSpec(HEADS, HEADS, SIZE, 0.2)

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs TRITON_INTERPRET=1 or a CUDA device")


@pytest.fixture(scope="module")
def large() -> torch.Tensor:
    """An FP8 cache of 2^31 elements and two blocks, of which a CPU gives memory to the pages that are written alone."""
    per_block = 2 * BLOCK * HEADS * SIZE
    return torch.empty(2**31 // per_block + 2, 2, BLOCK, HEADS, SIZE, dtype=FP8, device=DEVICE)


def test_the_last_blocks_of_a_large_cache(large: torch.Tensor) -> None:
    last = large.shape[0] - 1
    table = torch.tensor([[last, last - 1]], dtype=torch.int32, device=DEVICE)
    positions = torch.arange(20, device=DEVICE)
    slots = table[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 20, HEADS, SIZE, generator=generator).to(DEVICE).unbind(0)
    reshape_and_cache(key, value, large, slots)
    stored = gather(large, slots)
    twin = torch.zeros(2, 2, BLOCK, HEADS, SIZE, dtype=FP8, device=DEVICE)
    reshape_and_cache_in_torch(key, value, twin, positions)
    assert all(torch.equal(one, other) for one, other in zip(stored, gather(twin, positions), strict=True))
    expected = attend(query, *stored, SPEC, visible_keys(SPEC, 20, 20, DEVICE)).float()
    lens = torch.tensor([20], dtype=torch.int32, device=DEVICE)
    output = torch.empty_like(query)
    paged_prefill(
        query, large, torch.tensor([0, 20], dtype=torch.int32, device=DEVICE), lens, table, 20, output, scale=SPEC.scale
    )
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    one = torch.empty_like(query[-1:])
    paged_decode(query[-1:], large, table, lens, 20, one, scale=SPEC.scale)
    torch.testing.assert_close(one, expected[-1:], rtol=1e-3, atol=1e-3)


def _apart(*shape: int, dim: int) -> torch.Tensor:
    """A tensor whose steps along one dimension are so long that 32 bits do not count them; without memory."""
    strides = [0] * len(shape)
    strides[-1] = 1
    strides[dim] = 2**31
    return torch.empty_strided(shape, strides, device="meta")


INDEX = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
LENS = INDEX[0]
BEGINS = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)


class TestIndices:
    """Block tables, lengths and offsets of another width, or not contiguous, are somebody else's numbers."""

    CACHE = torch.zeros(2, 2, BLOCK, HEADS, SIZE, device=DEVICE)
    QUERY = torch.zeros(1, HEADS, SIZE, device=DEVICE)

    @pytest.mark.parametrize("name", ["block_tables", "seq_lens"])
    @pytest.mark.parametrize("kernel", ["decode", "prefill"])
    @pytest.mark.parametrize("wrong", ["int64", "strided"])
    def test_of_a_paged_cache(self, name: str, kernel: str, wrong: str) -> None:
        given = {"block_tables": INDEX, "seq_lens": LENS}
        wide = torch.zeros(*given[name].shape[:-1], 4, dtype=torch.int32, device=DEVICE)
        given[name] = given[name].long() if wrong == "int64" else wide[..., ::2]
        tables, lens, output = given["block_tables"], given["seq_lens"], torch.empty_like(self.QUERY)

        def attend() -> None:
            if kernel == "decode":
                paged_decode(self.QUERY, self.CACHE, tables, lens, 1, output, scale=1.0)
            else:
                paged_prefill(self.QUERY, self.CACHE, BEGINS, lens, tables, 1, output, scale=1.0)

        with pytest.raises(AttentionInputError, match=rf"{name} of .*needs int32 with contiguous rows"):
            attend()

    def test_of_packed_keys(self) -> None:
        output = torch.empty_like(self.QUERY)
        with pytest.raises(AttentionInputError, match=r"cu_seqlens_k of int64"):
            varlen_prefill(self.QUERY, self.QUERY, self.QUERY, BEGINS, BEGINS.long(), 1, output, scale=1.0)


class TestReach:
    """What 32 bits do not count within a block or a token."""

    TOKEN = torch.zeros(1, HEADS, SIZE, device=DEVICE)
    CACHE = torch.zeros(2, 2, BLOCK, HEADS, SIZE, device=DEVICE)

    @pytest.mark.parametrize("dim", [1, 2, 3])
    def test_of_a_block(self, dim: int) -> None:
        cache = _apart(2, 2, BLOCK, HEADS, SIZE, dim=dim)
        with pytest.raises(AttentionInputError, match=r"a block of the KV cache reach over \d+ elements: at most"):
            reshape_and_cache(self.TOKEN, self.TOKEN, cache, torch.zeros(1, dtype=torch.int64, device=DEVICE))
        with pytest.raises(AttentionInputError, match=r"a block of the KV cache"):
            paged_decode(self.TOKEN, cache, INDEX, LENS, 1, torch.empty_like(self.TOKEN), scale=1.0)
        with pytest.raises(AttentionInputError, match=r"a block of the KV cache"):
            paged_prefill(self.TOKEN, cache, BEGINS, LENS, INDEX, 1, torch.empty_like(self.TOKEN), scale=1.0)

    def test_of_a_token(self) -> None:
        wide, output = _apart(1, HEADS, SIZE, dim=1), torch.empty_like(self.TOKEN)
        slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        with pytest.raises(AttentionInputError, match="a token's values reach"):
            reshape_and_cache(self.TOKEN, wide, self.CACHE, slots)
        with pytest.raises(AttentionInputError, match="a token's queries reach"):
            paged_decode(wide, self.CACHE, INDEX, LENS, 1, output, scale=1.0)
        with pytest.raises(AttentionInputError, match="a token's keys reach"):
            varlen_prefill(self.TOKEN, wide, wide, BEGINS, BEGINS, 1, output, scale=1.0)
        lse = torch.zeros(1, HEADS, device=DEVICE)
        with pytest.raises(AttentionInputError, match="a token of the first state reach"):
            merge_attn_states(output, wide, lse, self.TOKEN, lse)
