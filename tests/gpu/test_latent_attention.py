"""Latent attention on a GPU, in DeepSeek's sizes: every backend that runs there against float64, and in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.backend import KVScales
from attention.backends.mla.base import MLABackend
from attention.fp8 import dequantize, quantize
from attention.metadata import build_metadata
from attention.platform import Platform
from attention.selection.registry import get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, MLASpec, Phase
from paged_case import shuffled_tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MLA = MLASpec(512, 128, 64, 128)
NAMES = ("TRITON_MLA", "FLASHINFER_MLA", "FLASH_ATTN_MLA", "FLASHMLA")
PROMPTS = [(300, 300), (65, 65), (2, 2), (129, 1000), (40, 2048)]
STEPS = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 1500), (1, 4000)]
SCALE = 0.02


def backend_for(name: str, spec: AttentionSpec, phase: Phase, block_size: int, dtype: torch.dtype) -> type[MLABackend]:
    backend = get_backend(name)
    reasons = unsupported_reasons(name, Platform.of("cuda"), [AttentionNeeds(spec, dtype, block_size, phase)])
    if reasons:
        pytest.skip("; ".join(reasons))
    assert issubclass(backend, MLABackend)
    return backend


class Batch:
    """Sequences of which the earlier tokens are cached; NaN, or what FP8 has for it, wherever no token is."""

    def __init__(self, lens: list[tuple[int, int]], heads: int, block_size: int, dtype: torch.dtype, fp8: bool) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

        self.lens, self.heads, self.fp8 = lens, heads, fp8
        self.spec = AttentionSpec(heads, 1, 576, 192**-0.5, mla=MLA, kv_cache_dtype=FP8 if fp8 else None)
        self.weight = normal(heads * 256, 512) * 512**-0.5
        self.latents = [normal(context, 576) for _, context in lens]
        self.queries = [normal(count, heads, 192) for count, _ in lens]
        tables = shuffled_tables([context for _, context in lens], block_size)
        self.common = build_metadata([q for q, _ in lens], [c for _, c in lens], tables, block_size, "cuda")
        shape = (sum(map(len, tables)) + 2, block_size, 576)
        self.cache = torch.full(shape, float("nan"), device="cuda", dtype=dtype)
        if fp8:
            self.cache = self.cache.to(FP8)
        rows = self.cache.view(-1, 576)
        for (count, context), table, latent in zip(lens, tables, self.latents, strict=True):
            at = torch.arange(context - count, device="cuda")
            slots = torch.tensor(table, device="cuda")[at // block_size] * block_size + at % block_size
            if fp8:
                rows.view(torch.uint8)[slots] = quantize(latent[: context - count], SCALE).view(torch.uint8)
            else:
                rows[slots] = latent[: context - count]

    def run(self, backend: type[MLABackend], *, stored: bool = False) -> torch.Tensor:
        """Attend; with `stored` the new tokens are in the cache already."""
        new = torch.cat([latent[-count:] for (count, _), latent in zip(self.lens, self.latents, strict=True)])
        impl = backend.impl_class(self.spec, self.weight)
        impl.kv_scales = KVScales(SCALE) if self.fp8 else KVScales()
        builder = backend.builder_class(self.spec, self.weight.dtype, self.cache.shape[1], self.weight.device)
        query, planned = torch.cat(self.queries), builder.build(self.common)
        key, value = (None, None) if stored else new.split((512, 64), dim=-1)
        return impl.forward(query, key, value, self.cache, planned)

    def expected(self) -> torch.Tensor:
        """(T, Hq, 128) float64."""
        outputs = []
        for (count, context), latent, query in zip(self.lens, self.latents, self.queries, strict=True):
            seen = (dequantize(quantize(latent, SCALE), SCALE) if self.fp8 else latent).double()
            kv = (seen[:, :512] @ self.weight.double().T).view(context, self.heads, 256)
            keys = torch.cat((kv[..., :128], seen[:, None, 512:].expand(-1, self.heads, -1)), dim=-1)
            scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * self.spec.scale
            at = torch.arange(context, device="cuda")
            scores.masked_fill_(at[None, :] > at[context - count :, None], float("-inf"))
            outputs.append(torch.einsum("hqk,khv->qhv", scores.softmax(-1), kv[..., 128:]))
        return torch.cat(outputs)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square, as a part of what is expected."""
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", NAMES)
def test_decode(name: str, block_size: int, heads: int, fp8: bool) -> None:
    batch = Batch(STEPS, heads, block_size, torch.bfloat16, fp8)
    backend = backend_for(name, batch.spec, Phase.DECODE, block_size, torch.bfloat16)
    assert error(batch.run(backend), batch.expected()) < (0.02 if fp8 else 0.01)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_chunks(name: str, heads: int, fp8: bool) -> None:
    batch = Batch(PROMPTS, heads, 64, torch.bfloat16, fp8)
    backend = backend_for(name, batch.spec, Phase.PREFILL, 64, torch.bfloat16)
    assert error(batch.run(backend), batch.expected()) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_both_in_one_batch_in_small_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attention.backends.mla import expanding

    batch = Batch([*PROMPTS, *STEPS], 16, 64, torch.bfloat16, False)
    backend = backend_for(name, batch.spec, Phase.PREFILL, 64, torch.bfloat16)
    backend_for(name, batch.spec, Phase.DECODE, 64, torch.bfloat16)
    monkeypatch.setattr(expanding, "workspace_tokens", lambda spec, dtype: 300)
    assert error(batch.run(backend), batch.expected()) < 0.01


@pytest.mark.parametrize("lens", [PROMPTS, STEPS], ids=["prompts", "steps"])
def test_float32(lens: list[tuple[int, int]]) -> None:
    batch = Batch(lens, 16, 16, torch.float32, False)
    backend = backend_for("TRITON_MLA", batch.spec, Phase.DECODE, 16, torch.float32)
    assert error(batch.run(backend), batch.expected()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_decode_serves_other_lengths(name: str) -> None:
    batch = Batch(STEPS, 16, 64, torch.bfloat16, False)
    backend = backend_for(name, batch.spec, Phase.DECODE, 64, torch.bfloat16)
    builder = backend.builder_class(batch.spec, torch.bfloat16, 64, torch.device("cuda"))
    if not builder.graph_safe_decode:
        pytest.skip("its decode is planned by the lengths")
    expected = batch.run(backend)
    impl = backend.impl_class(batch.spec, batch.weight)
    common = batch.common
    lens = common.seq_lens.clone()
    common = replace(common, seq_lens=lens, context_lens=(4096,) * common.num_seqs)
    query, output = torch.cat(batch.queries), torch.empty_like(expected)
    lens.fill_(1)
    impl.forward(query, None, None, batch.cache, builder.build(common), output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        impl.forward(query, None, None, batch.cache, builder.build(common), output)
    lens.copy_(batch.common.seq_lens)
    graph.replay()
    assert error(output, expected.double()) < 0.005
    lens[2] = 0
    graph.replay()
    assert not output[2].any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_norm_rotation_and_cache_write_in_one_kernel(fp8: bool, interleaved: bool) -> None:
    from workers.ops.cache_write import CacheWrite
    from workers.ops.latent_norm_rope import latent_norm_rope_, latent_norm_rope_torch_
    from workers.ops.qk_norm_rope import cos_sin_table
    from workers.ops.rope_config import RopeConfig

    generator = torch.Generator(device="cuda").manual_seed(3)
    wide = torch.randn(37, 20 * 192 + 576, device="cuda", generator=generator, dtype=torch.bfloat16)
    weight = torch.rand(512, device="cuda", generator=generator).to(torch.bfloat16)
    positions = torch.randint(0, 500, (37,), device="cuda", generator=generator)
    table = cos_sin_table(RopeConfig(1e4), 64, 500, torch.device("cuda"))
    slots = torch.randperm(160, device="cuda")[:37]
    slots[5] = -1
    results = []
    for op in (latent_norm_rope_, latent_norm_rope_torch_):
        own = wide.clone()
        cache = torch.zeros(10, 16, 576, device="cuda", dtype=torch.bfloat16)
        cache = cache.to(FP8) if fp8 else cache
        write = CacheWrite(cache, slots, KVScales(0.02))
        query, latent = own[:, : 20 * 192].unflatten(1, (20, 192)), own[:, 20 * 192 :]
        op(query, latent, positions, table, weight, 1e-6, write, interleaved)
        results.append((own, cache.float()))
    (ours, stored), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(stored, expected, rtol=0.13, atol=2e-2)
