"""The decode kernels of latent attention for Hopper: where they are taken, and on such a GPU what they compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention.ops.triton.latent import few_heads
from attention.ops.triton.latent.decode import latent_decode
from attention.ops.triton.latent.hopper import serves
from attention.ops.triton.launch import DeviceTraits

R, P = 512, 64
SCALE = 2 * 576**-0.5
H200 = DeviceTraits("sm90", 132, 227 << 10, True)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def tensors(heads: int = 128, block_size: int = 64, dtype: torch.dtype = torch.bfloat16, rank: int = R) -> Any:
    return (
        torch.empty(2, heads, rank, dtype=dtype),
        torch.empty(2, heads, P, dtype=dtype),
        torch.empty(4, block_size, rank + P, dtype=dtype),
    )


def test_many_heads_over_16_bit_latents_have_it() -> None:
    for heads in (64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            assert serves(*tensors(heads, 64, dtype), H200)
    assert serves(*tensors(block_size=128), H200)


@pytest.mark.parametrize(
    ("given", "traits"),
    [
        (tensors(heads=16), H200),
        (tensors(heads=96), H200),
        (tensors(block_size=32), H200),
        (tensors(dtype=torch.float32), H200),
        (tensors(rank=256), H200),
        ((*tensors()[:2], tensors()[2].to(torch.float8_e4m3fn)), H200),
        ((*tensors()[:2], torch.empty(4, 2, 64, 576, dtype=torch.bfloat16)[:, 0]), H200),
        ((*tensors()[:2], torch.empty(4, 64, 580, dtype=torch.bfloat16)[..., :576]), H200),
        ((*tensors()[:2], tensors()[2][:0]), H200),
        (tensors(), replace(H200, arch="sm100")),
        (tensors(), replace(H200, arch="hip")),
    ],
)
def test_all_else_has_not(given: Any, traits: DeviceTraits) -> None:
    assert not serves(*given, traits)


def test_few_heads_have_theirs() -> None:
    for heads in (1, 16):
        for dtype in (torch.bfloat16, torch.float16):
            query, rotary, cache = tensors(heads, 32, dtype)
            assert few_heads.serves(query, rotary, cache, H200)
            assert few_heads.serves(query, rotary, cache.to(torch.float8_e4m3fn), H200)


@pytest.mark.parametrize(
    ("given", "traits"),
    [
        (tensors(heads=17), H200),
        (tensors(heads=16, block_size=16), H200),
        (tensors(heads=16, dtype=torch.float32), H200),
        (tensors(heads=16, rank=256), H200),
        ((*tensors(heads=16)[:2], tensors(dtype=torch.float16)[2]), H200),
        ((*tensors(heads=16)[:2], torch.empty(4, 64, 580, dtype=torch.bfloat16)[..., :576]), H200),
        ((*tensors(heads=16)[:2], torch.empty(4 * 64 * 576 + 4, dtype=torch.bfloat16)[4:].view(4, 64, 576)), H200),
        (tensors(heads=16), replace(H200, arch="sm100")),
    ],
)
def test_all_else_has_not_theirs(given: Any, traits: DeviceTraits) -> None:
    assert not few_heads.serves(*given, traits)


def test_an_unknown_triton_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "4.0.0")
    assert not serves(*tensors(), H200)
    assert not few_heads.serves(*tensors(heads=16), H200)


def poisoned_batch(lens: list[int], heads: int, block_size: int, dtype: torch.dtype, fp8: bool = False) -> Any:
    """Queries and a cache in which all that belongs to no sequence is no number."""
    generator = torch.Generator("cuda").manual_seed(len(lens))
    counts = [-(-n // block_size) for n in lens]
    cache = torch.full((sum(counts) + 1, block_size, R + P), float("nan"), device="cuda", dtype=dtype)
    tables = torch.full((len(lens), max(max(counts), 1)), 2**30, device="cuda", dtype=torch.int32)
    blocks = iter(torch.randperm(sum(counts)).tolist())
    for i, n in enumerate(lens):
        for j in range(counts[i]):
            tables[i, j] = block = next(blocks)
            size = min(block_size, n - j * block_size)
            cache[block, :size] = torch.randn(size, R + P, device="cuda", generator=generator).to(dtype)
    wide = torch.randn(heads, len(lens), R + P, device="cuda", generator=generator).to(dtype).transpose(0, 1)
    return wide[..., :R], wide[..., R:], cache.to(torch.float8_e4m3fn) if fp8 else cache, tables


@on_hopper
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    ("heads", "block_size", "dtype", "fp8"),
    [
        (128, 64, torch.bfloat16, False),
        (64, 128, torch.bfloat16, False),
        (128, 64, torch.float16, False),
        (16, 64, torch.bfloat16, False),
        (5, 32, torch.float16, False),
        (16, 64, torch.bfloat16, True),
        (12, 32, torch.float16, True),
    ],
)
def test_the_kernels_against_float64(
    heads: int, block_size: int, dtype: torch.dtype, fp8: bool, splits: int | None
) -> None:
    lens = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 320, 700, 1000, 9000]
    query, rotary, cache, tables = poisoned_batch(lens, heads, block_size, dtype, fp8)
    assert (serves if heads > 16 else few_heads.serves)(query, rotary, cache, H200)
    output = torch.full((len(lens), heads, R), float("nan"), device="cuda", dtype=dtype)
    lse = torch.full((len(lens), heads), float("nan"), device="cuda")
    seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    latent_decode(
        query, rotary, cache, tables, seq_lens, max(lens), output, scale=SCALE, cache_scale=0.5, lse=lse,
        num_splits=splits,
    )  # fmt: skip
    assert not output[0].any()
    assert lse[0].eq(float("-inf")).all()
    for i, n in enumerate(lens[1:], 1):
        latents = 0.5 * cache[tables[i, : -(-n // block_size)].long()].double().flatten(0, 1)[:n]
        scores = torch.cat((query[i], rotary[i]), dim=-1).double() @ latents.T * SCALE
        torch.testing.assert_close(lse[i].double(), scores.logsumexp(-1), rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(output[i].double(), scores.softmax(-1) @ latents[:, :R], rtol=2e-2, atol=1e-2)


@on_hopper
@pytest.mark.parametrize("heads", [16, 128])
def test_a_kernel_in_a_graph_serves_other_lengths(heads: int) -> None:
    query, rotary, cache, tables = poisoned_batch([300, 65, 1], heads, 64, torch.bfloat16)
    output = torch.empty(3, heads, R, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor([0, 0, 0], dtype=torch.int32, device="cuda")

    def attend(out: torch.Tensor) -> None:
        latent_decode(query, rotary, cache, tables, lens, 300, out, scale=SCALE)

    attend(output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(output)
    lens.copy_(torch.tensor([300, 65, 1]))
    graph.replay()
    eager = torch.empty_like(output)
    attend(eager)
    assert torch.equal(output, eager)
    assert output[0].any()
