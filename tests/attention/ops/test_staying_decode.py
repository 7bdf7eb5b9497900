"""Decode by programs that stay: where it serves, how it deals sequences out, and on a Hopper GPU what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention.ops.triton.decode import paged_decode
from attention.ops.triton.launch import DeviceTraits
from attention.ops.triton.staying_decode import deal, serves

H200 = DeviceTraits("sm90", 132, 227 << 10, True)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
LENS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192, 193, 500, 0, 1000, 9000]


def tensors(
    heads: int = 32, kv_heads: int = 8, size: int = 128, block_size: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Any:
    return torch.empty(2, heads, size, dtype=dtype), torch.empty(4, 2, block_size, kv_heads, size, dtype=dtype)


def test_plain_heads_of_16_bits_have_it() -> None:
    for heads, kv_heads in ((32, 8), (8, 8), (64, 4)):
        for size in (64, 128):
            assert serves(*tensors(heads, kv_heads, size), H200)
    assert serves(*tensors(block_size=128, dtype=torch.float16), H200)
    query, cache = tensors()
    assert serves(query, cache.transpose(2, 3).contiguous().transpose(2, 3), H200)


@pytest.mark.parametrize(
    ("given", "traits"),
    [
        (tensors(size=256), H200),
        (tensors(size=96), H200),
        (tensors(heads=136), H200),
        (tensors(block_size=32), H200),
        (tensors(dtype=torch.float32), H200),
        ((tensors()[0], tensors()[1].to(torch.float8_e4m3fn)), H200),
        ((tensors()[0], tensors(dtype=torch.float16)[1]), H200),
        ((tensors()[0].expand(1025, 2, 32, 128)[:, 0], tensors()[1]), H200),
        ((tensors()[0], torch.empty(4, 2, 64, 8, 132, dtype=torch.bfloat16)[..., :128]), H200),
        ((tensors()[0], torch.empty(8 * 64 * 1024 + 4, dtype=torch.bfloat16)[4:].view(4, 2, 64, 8, 128)), H200),
        (tensors(), replace(H200, arch="sm100")),
    ],
)
def test_all_else_has_not(given: Any, traits: DeviceTraits) -> None:
    assert not serves(*given, traits)


@pytest.mark.parametrize("num_pairs", [1, 8, 64, 130, 192, 300, 512, 800, 2048])
def test_few_multiprocessors_wait_for_the_last_pieces(num_pairs: int) -> None:
    splits, _ = deal(num_pairs, 1 << 17, 132)
    pieces = num_pairs * splits.wanted
    assert splits.count >= splits.wanted
    assert pieces >= 0.85 * 132 * max(2, -(-pieces // 132)) or splits.wanted == 64


def test_short_sequences_are_not_split() -> None:
    assert deal(1, 100, 132)[0].wanted == 1
    assert deal(1, 300, 132)[0].wanted == 3
    splits, min_tiles = deal(192, 600, 132)
    assert splits.wanted == 1
    assert min_tiles > deal(8, 600, 132)[1]


def poisoned_batch(lens: list[int], kv_heads: int, size: int, block_size: int, dtype: torch.dtype) -> Any:
    """A cache in which all that belongs to no sequence is no number."""
    generator = torch.Generator("cuda").manual_seed(len(lens))
    counts = [-(-n // block_size) for n in lens]
    cache = torch.full((sum(counts) + 1, 2, block_size, kv_heads, size), float("nan"), device="cuda", dtype=dtype)
    tables = torch.full((len(lens), max(max(counts), 1)), 2**30, device="cuda", dtype=torch.int32)
    blocks = iter(torch.randperm(sum(counts)).tolist())
    for i, n in enumerate(lens):
        for j in range(counts[i]):
            tables[i, j] = block = next(blocks)
            kept = min(block_size, n - j * block_size)
            cache[block, :, :kept] = torch.randn(2, kept, kv_heads, size, device="cuda", generator=generator).to(dtype)
    return cache, tables


@on_hopper
@pytest.mark.parametrize("splits", [1, 3, 11, None])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block_size", "dtype"),
    [
        (32, 8, 128, 64, torch.bfloat16),
        (8, 8, 64, 128, torch.float16),
        (16, 2, 128, 64, torch.bfloat16),
        (24, 2, 64, 64, torch.bfloat16),
        (32, 2, 128, 128, torch.float16),
    ],
)
def test_the_kernel_against_float64(
    heads: int, kv_heads: int, size: int, block_size: int, dtype: torch.dtype, splits: int | None
) -> None:
    cache, tables = poisoned_batch(LENS, kv_heads, size, block_size, dtype)
    query = torch.randn(heads, len(LENS), size, device="cuda").to(dtype).transpose(0, 1)
    assert serves(query, cache, H200)
    output = torch.full((len(LENS), heads, size), float("nan"), device="cuda", dtype=dtype)
    lse = torch.full((len(LENS), heads), float("nan"), device="cuda")
    seq_lens = torch.tensor(LENS, dtype=torch.int32, device="cuda")
    counters = torch.zeros(len(LENS) * kv_heads, dtype=torch.int32, device="cuda")
    paged_decode(
        query, cache, tables, seq_lens, max(LENS), output, scale=0.3, k_scale=0.5, v_scale=2.0, lse=lse,
        num_splits=splits, counters=counters,
    )  # fmt: skip
    assert not counters.any()
    for i, n in enumerate(LENS):
        if n == 0:
            assert not output[i].any()
            assert lse[i].eq(float("-inf")).all()
            continue
        keys, values = cache[tables[i, : -(-n // block_size)].long()].transpose(0, 1).flatten(1, 2)[:, :n].double()
        for kv_head in range(kv_heads):
            group = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            scores = query[i, group].double() @ keys[:, kv_head].T * 0.15
            torch.testing.assert_close(lse[i, group].double(), scores.logsumexp(-1), rtol=1e-4, atol=2e-3)
            wanted = 2.0 * scores.softmax(-1) @ values[:, kv_head]
            torch.testing.assert_close(output[i, group].double(), wanted, rtol=2e-2, atol=2e-2)


@on_hopper
def test_the_kernel_in_a_graph_serves_other_lengths() -> None:
    lens = [5000, 65, 1, 0] * 80
    cache, tables = poisoned_batch(lens, 8, 128, 64, torch.bfloat16)
    query = torch.randn(len(lens), 32, 128, device="cuda", dtype=torch.bfloat16)
    output = torch.empty_like(query)
    seq_lens = torch.zeros(len(lens), dtype=torch.int32, device="cuda")
    counters = torch.zeros(len(lens) * 8, dtype=torch.int32, device="cuda")

    def attend(out: torch.Tensor) -> None:
        paged_decode(query, cache, tables, seq_lens, 30000, out, scale=0.1, counters=counters)

    attend(output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(output)
    seq_lens.copy_(torch.tensor(lens))
    graph.replay()
    eager = torch.empty_like(output)
    attend(eager)
    assert torch.equal(output, eager)
    assert output[0].any()
    for _ in range(50):
        graph.replay()
        assert torch.equal(output, eager)
