"""Multi-head latent attention: CPU_MLA against attention over expanded keys in float64, the layer, the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention.backend import KVScales
from attention.backends.common.per_phase import backend_by_phase
from attention.backends.mla.base import MLABackend, MLAImpl
from attention.backends.mla.cpu_mla import CpuMLABackend, CpuMLAImpl
from attention.backends.mla.prefill_plan import Piece, cut_context
from attention.backends.mla.triton_mla import TritonMLABackend
from attention.errors import AttentionBackendError, AttentionInputError
from attention.forward_context import ForwardContext, forward_context
from attention.fp8 import quantize
from attention.kv_cache import KVCacheSpec, concat_and_cache_mla
from attention.layers.mla_attention import MLAAttention
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.selection.registry import get_backend
from attention.spec import FP8, AttentionNeeds, AttentionSpec, MLASpec
from attention_reference import attend, fp8_round_trip, visible_keys
from long_tails import slow_unless
from paged_case import MIXED, shuffled_tables

MLA = MLASpec(kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
HEADS = 6
SPEC = AttentionSpec(HEADS, 1, MLA.latent_size, (MLA.qk_nope_head_dim + MLA.qk_rope_head_dim) ** -0.5, mla=MLA)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
BACKENDS = pytest.mark.parametrize("backend", [CpuMLABackend, TritonMLABackend], ids=lambda b: b.name)


class Sequences:
    """Queries and latents of whole sequences, and attention over them written out in float64."""

    def __init__(self, contexts: list[int], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(HEADS * (MLA.qk_nope_head_dim + MLA.v_head_dim), MLA.kv_lora_rank).mul(0.2).to(dtype)
        self.queries = [torch.randn(n, HEADS, MLA.qk_nope_head_dim + MLA.qk_rope_head_dim).to(dtype) for n in contexts]
        self.latents = [torch.randn(n, MLA.latent_size).to(dtype) for n in contexts]

    def expected(self, i: int, fp8_scale: float | None = None) -> torch.Tensor:
        """(n, Hq, Dv) float64: every head's keys and values expanded, then ordinary attention."""
        latent = self.latents[i] if fp8_scale is None else fp8_round_trip(self.latents[i], fp8_scale)
        c, k_pe = latent.double().split((MLA.kv_lora_rank, MLA.qk_rope_head_dim), dim=-1)
        kv = (c @ self.weight.double().T).view(len(c), HEADS, -1)
        nope, value = kv.split((MLA.qk_nope_head_dim, MLA.v_head_dim), dim=-1)
        key = torch.cat((nope, k_pe[:, None].expand(-1, HEADS, -1)), dim=-1)
        spec = AttentionSpec(HEADS, HEADS, key.shape[-1], SPEC.scale)
        return attend(self.queries[i], key, value, spec, visible_keys(spec, len(c), len(c)))


def run(
    backend: type[MLABackend],
    impl: MLAImpl,
    sequences: Sequences,
    lens: list[tuple[int, int]],
    tables: list[list[int]],
    cache: torch.Tensor,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed the last tokens of each sequence's first `context` tokens."""
    common = batch(lens, tables, cache.shape[1])
    query = torch.cat([sequences.queries[i][c - q : c] for i, (q, c) in enumerate(lens)])
    latent = torch.cat([sequences.latents[i][c - q : c] for i, (q, c) in enumerate(lens)])
    kv_c, k_pe = latent.split((MLA.kv_lora_rank, MLA.qk_rope_head_dim), dim=-1)
    builder = backend.builder_class(impl.spec, query.dtype, cache.shape[1], query.device)
    return impl.forward(query, kv_c, k_pe, cache, builder.build(common), output)


def batch(lens: list[tuple[int, int]], tables: list[list[int]], block_size: int) -> CommonAttentionMetadata:
    return build_metadata([q for q, _ in lens], [c for _, c in lens], tables, block_size)


def poisoned_cache(tables: list[list[int]], block_size: int, dtype: torch.dtype) -> torch.Tensor:
    shape = CpuMLABackend.get_kv_cache_shape(sum(map(len, tables)) + 2, block_size, 1, MLA.latent_size)
    return torch.full(shape, float("nan"), dtype=dtype)


@BACKENDS
@pytest.mark.parametrize("block_size", slow_unless((16).__eq__, [1, 16, 64]))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ragged_batches_match_expanded_attention(
    backend: type[MLABackend], dtype: torch.dtype, block_size: int
) -> None:
    lens = [*MIXED, (1, 64), (1, 65), (1, 15)]
    sequences = Sequences([c for _, c in lens], dtype)
    tables = shuffled_tables([c for _, c in lens], block_size)
    cache = poisoned_cache(tables, block_size, dtype)
    for i, (q, c) in enumerate(lens):
        earlier = sequences.latents[i][: c - q]
        for position, latent in enumerate(earlier):
            cache[tables[i][position // block_size], position % block_size] = latent
    impl = backend.impl_class(SPEC, sequences.weight)
    poisoned = torch.full((sum(q for q, _ in lens), HEADS, MLA.v_head_dim), float("nan"), dtype=dtype)
    got = run(backend, impl, sequences, lens, tables, cache, poisoned)
    expected = torch.cat([sequences.expected(i)[c - q :] for i, (q, c) in enumerate(lens)])
    assert got is poisoned
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@BACKENDS
def test_chunks_of_any_size_and_single_tokens_give_what_one_prefill_gives(backend: type[MLABackend]) -> None:
    length, block_size = 70, 16
    sequences = Sequences([length])
    tables = shuffled_tables([length], block_size)
    impl = backend.impl_class(SPEC, sequences.weight)
    whole = run(backend, impl, sequences, [(length, length)], tables, poisoned_cache(tables, block_size, torch.float32))
    cache = poisoned_cache(tables, block_size, torch.float32)
    pieces, done = [], 0
    for chunk in (16, 1, 15, 2, 30, 1, 1, 1, 3):
        done += chunk
        pieces.append(run(backend, impl, sequences, [(chunk, done)], tables, cache))
    assert done == length
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.double(), sequences.expected(0), rtol=1e-5, atol=1e-5)


def test_prompts_longer_than_a_tile() -> None:
    sequences = Sequences([600])
    tables = shuffled_tables([600], 16)
    cache = poisoned_cache(tables, 16, torch.float32)
    impl = CpuMLAImpl(SPEC, sequences.weight)
    got = torch.cat(
        [run(CpuMLABackend, impl, sequences, [(n, at)], tables, cache) for n, at in ((290, 290), (310, 600))]
    )
    torch.testing.assert_close(got.double(), sequences.expected(0), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_an_fp8_cache_is_what_is_seen_in_prefill_and_decode(backend: type[MLABackend]) -> None:
    scale, lens = 0.01, [(40, 40), (1, 1)]
    sequences = Sequences([41, 1])
    tables = shuffled_tables([41, 1], 16)
    cache = torch.full((8, 16, MLA.latent_size), float("nan")).to(FP8)
    impl = backend.impl_class(replace(SPEC, kv_cache_dtype=FP8), sequences.weight)
    impl.kv_scales = KVScales(scale)
    prefill = run(backend, impl, sequences, lens, tables, cache)
    decode = run(backend, impl, sequences, [(1, 41)], tables[:1], cache)
    torch.testing.assert_close(
        torch.cat((prefill[:40], decode)).double(), sequences.expected(0, scale), rtol=1e-5, atol=1e-5
    )
    latent = cache.view(-1, MLA.latent_size)[batch([(1, 1)], tables[1:], 16).slot_mapping[0]]
    assert torch.equal(latent.view(torch.uint8), quantize(sequences.latents[1][0], scale).view(torch.uint8))


def test_latents_are_stored_and_nothing_else_is_touched() -> None:
    cache = torch.full((5, 4, MLA.latent_size), 7.0)
    before = cache.clone()
    latent = torch.randn(3, MLA.latent_size)
    kv_c, k_pe = latent.split((MLA.kv_lora_rank, MLA.qk_rope_head_dim), dim=-1)
    concat_and_cache_mla(kv_c, k_pe, cache, torch.tensor([3, 16, 7]))
    before[0, 3], before[4, 0], before[1, 3] = latent
    assert torch.equal(cache, before)


def test_the_size_of_a_cache_of_latents() -> None:
    spec = KVCacheSpec(layers=(0, 1, 2), num_kv_heads=1, head_size=576, block_size=64, dtype=torch.bfloat16, kind="mla")
    assert spec.bytes_per_token == 3 * 576 * 2
    assert spec.bytes_per_block == 64 * 3 * 576 * 2
    assert spec.blocks_that_fit(10 * spec.bytes_per_block + 1) == 10
    cache = spec.allocate(2, "cpu")
    assert cache.shape == (3, *CpuMLABackend.get_kv_cache_shape(2, 64, 1, 576)) == (3, 2, 64, 576)
    assert cache.nbytes == 2 * spec.bytes_per_block
    with pytest.raises(ValueError, match="1 key/value head, not 2"):
        replace(spec, num_kv_heads=2)
    with pytest.raises(AttentionInputError, match="not 2"):
        CpuMLABackend.get_kv_cache_shape(2, 64, 2, 576)


@pytest.mark.parametrize("budget", [pytest.param(1, marks=pytest.mark.slow), 7, 20, 1000])
def test_context_beyond_the_workspace_is_merged_piece_by_piece(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from attention.backends.mla import expanding

    monkeypatch.setattr(expanding, "workspace_tokens", lambda spec, dtype: budget)
    lens = [(5, 30), (3, 3), (1, 9), (2, 40), (4, 18), (6, 6)]
    sequences = Sequences([c for _, c in lens])
    tables = shuffled_tables([c for _, c in lens], 4)
    cache = poisoned_cache(tables, 4, torch.float32)
    for i, (q, c) in enumerate(lens):
        for position, latent in enumerate(sequences.latents[i][: c - q]):
            cache[tables[i][position // 4], position % 4] = latent
    impl = TritonMLABackend.impl_class(SPEC, sequences.weight)
    got = run(TritonMLABackend, impl, sequences, lens, tables, cache)
    expected = torch.cat([sequences.expected(i)[c - q :] for i, (q, c) in enumerate(lens)])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 5, 16])
def test_the_decode_kernel_alone(heads: int) -> None:
    from attention.ops.triton.latent.decode import latent_decode

    generator = torch.Generator().manual_seed(1)
    query, rotary = torch.randn(3, heads, 24, generator=generator), torch.randn(3, heads, 8, generator=generator)
    cache = torch.randn(20, 16, 32, generator=generator)
    tables = torch.randperm(18, generator=generator).view(3, 6).int()
    lens = torch.tensor([90, 0, 33], dtype=torch.int32)
    outputs = []
    for splits in (1, 3):
        output, lse = torch.full_like(query, float("nan")), torch.full((3, heads), float("nan"))
        latent_decode(query, rotary, cache, tables, lens, 90, output, scale=0.3, lse=lse, num_splits=splits)
        outputs.append((output, lse))
    torch.testing.assert_close(*outputs)
    assert not outputs[0][0][1].any()
    latents = cache[tables[2].long()].flatten(0, 1)[:33].double()
    scores = torch.cat((query[2], rotary[2]), dim=-1).double() @ latents.T * 0.3
    expected = scores.softmax(-1) @ latents[:, :24]
    torch.testing.assert_close(outputs[0][0][2].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0][1][2].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 64])
def test_products_of_a_few_rows_with_a_matrix_of_each_head(rows: int) -> None:
    from attention.ops.triton.latent.head_products import head_product

    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, 3, 20, generator=generator)
    weight = torch.randn(3, 12, 24, generator=generator)
    into = torch.full((rows, 3, 30), float("nan"))
    head_product(wide[..., :12], weight, into[..., :24])
    torch.testing.assert_close(into[..., :24], torch.einsum("bhk,hkn->bhn", wide[..., :12], weight))
    assert into[..., 24:].isnan().all()
    back = torch.empty(rows, 3, 12)
    head_product(into[..., :24], weight.transpose(1, 2), back)
    torch.testing.assert_close(back, torch.einsum("bhk,hnk->bhn", into[..., :24], weight))
    with pytest.raises(AttentionInputError, match="at most 64 rows"):
        head_product(wide.repeat(65, 1, 1)[:65, :, :12], weight, torch.empty(65, 3, 24))


def test_how_context_is_cut() -> None:
    assert [list(chunk) for chunk in cut_context([5, 0, 3, 4], 6)] == [
        [Piece(0, 0, 5)],
        [Piece(2, 0, 3), Piece(3, 0, 3)],
        [Piece(3, 3, 1)],
    ]
    assert list(cut_context([0, 0], 6)) == []
    assert [chunk[0].length for chunk in cut_context([13], 6)] == [6, 6, 1]


def test_sequences_without_tokens_give_zeros_in_decode() -> None:
    sequences = Sequences([20, 1])
    tables = shuffled_tables([20, 1], 16)
    cache = poisoned_cache(tables, 16, torch.float32)
    impl = TritonMLABackend.impl_class(SPEC, sequences.weight)
    run(TritonMLABackend, impl, sequences, [(20, 20), (1, 1)], tables, cache)
    common = replace(batch([(1, 20), (1, 1)], tables, 16), seq_lens=torch.tensor([20, 0], dtype=torch.int32))
    builder = TritonMLABackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    query = torch.cat((sequences.queries[0][19:], sequences.queries[1]))
    got = impl.forward(query, None, None, cache, builder.build(common))
    torch.testing.assert_close(got[0].double(), sequences.expected(0)[19], rtol=1e-5, atol=1e-5)
    assert not got[1].any()


class TestLayer:
    """`MLAAttention` inside a forward context."""

    NAME = "layers.0.attn"

    def setup_method(self) -> None:
        self.sequences = Sequences([20])
        self.tables = shuffled_tables([20], 16)
        self.cache = poisoned_cache(self.tables, 16, torch.float32)
        common = batch([(20, 20)], self.tables, 16)
        self.metadata = CpuMLABackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu")).build(common)
        self.kv_c, self.k_pe = self.sequences.latents[0].split((MLA.kv_lora_rank, MLA.qk_rope_head_dim), dim=-1)

    def layer(self, spec: AttentionSpec = SPEC, scales: KVScales | None = None) -> MLAAttention:
        return MLAAttention(spec, CpuMLABackend, self.NAME, self.sequences.weight.clone(), scales)

    def context(self, layer: MLAAttention, **more: object) -> ForwardContext:
        return ForwardContext({self.NAME: layer}, {self.NAME: self.metadata}, {self.NAME: self.cache}, **more)  # type: ignore[arg-type]

    def test_the_hooks_are_called_around_the_cache_write(self) -> None:
        layer, seen = self.layer(), []
        slots = self.metadata.common.slot_mapping

        def stored(when: str) -> None:
            rows = self.cache.view(-1, MLA.latent_size)[slots]
            seen.append((when, bool(torch.equal(rows, self.sequences.latents[0]))))

        context = self.context(
            layer, wait_for_layer=lambda name: stored(f"wait {name}"), save_layer=lambda name: stored(f"save {name}")
        )
        with forward_context(context):
            got = layer(self.sequences.queries[0], self.kv_c, self.k_pe)
        assert seen == [(f"wait {self.NAME}", False), (f"save {self.NAME}", True)]
        torch.testing.assert_close(got.double(), self.sequences.expected(0), rtol=1e-5, atol=1e-5)

    def test_a_weight_filled_in_place_or_moved_is_the_one_that_is_used(self) -> None:
        layer = self.layer()
        filled = torch.randn_like(self.sequences.weight)
        layer.kv_b_proj.copy_(filled)
        layer = layer.double()
        self.cache = self.cache.double()
        with forward_context(self.context(layer)):
            got = layer(self.sequences.queries[0].double(), self.kv_c.double(), self.k_pe.double())
        self.sequences.weight = filled
        torch.testing.assert_close(got, self.sequences.expected(0), rtol=1e-9, atol=1e-9)

    def test_compiled_with_a_full_graph(self) -> None:
        import attention.unified_attention  # noqa: F401  # registers the operator

        layer = self.layer()
        compiled = torch.compile(lambda q: layer(q * 1.0, self.kv_c, self.k_pe) + 0.0, backend="eager", fullgraph=True)
        with forward_context(self.context(layer)):
            got = compiled(self.sequences.queries[0])
        torch.testing.assert_close(got.double(), self.sequences.expected(0), rtol=1e-5, atol=1e-5)

    def test_fp8_scales_come_from_the_first_tokens(self) -> None:
        layer = self.layer(replace(SPEC, kv_cache_dtype=FP8))
        self.cache = torch.zeros(self.cache.shape).to(FP8)
        with forward_context(self.context(layer)):
            got = layer(self.sequences.queries[0], self.kv_c, self.k_pe)
        scale = layer.impl.kv_scales.k
        assert scale == pytest.approx(self.sequences.latents[0].abs().max().item() / 448.0)
        torch.testing.assert_close(got.double(), self.sequences.expected(0, scale), rtol=1e-5, atol=1e-5)

    def test_a_context_without_the_layer(self) -> None:
        layer = self.layer()
        with pytest.raises(AttentionInputError, match="no batch for layer"):
            layer.attend(ForwardContext({}, {}, {}), self.sequences.queries[0], self.kv_c, self.k_pe)
        with pytest.raises(AttentionInputError, match="no KV cache for layer"):
            layer.attend(
                ForwardContext({}, {self.NAME: self.metadata}, {}), self.sequences.queries[0], self.kv_c, self.k_pe
            )


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(HEADS * (MLA.qk_nope_head_dim + MLA.v_head_dim), MLA.kv_lora_rank)
    with pytest.raises(AttentionInputError, match=r"kv_b_proj of shape \(3, 24\), expected \(132, 24\)"):
        CpuMLAImpl(SPEC, weight[:3])
    with pytest.raises(AttentionInputError, match=r"without `AttentionSpec\.mla`"):
        CpuMLAImpl(replace(SPEC, mla=None), weight)
    with pytest.raises(AttentionInputError, match="1 key/value head of the latent's 32, not 1 of 16"):
        CpuMLAImpl(replace(SPEC, head_size=16), weight)
    with pytest.raises(AttentionBackendError, match="IPEX is not made for latent attention"):
        MLAAttention(SPEC, get_backend("IPEX"), "layer", weight)
    impl = CpuMLAImpl(SPEC, weight)
    common = batch([(2, 2)], [[0]], 16)
    builder = CpuMLABackend.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    metadata = builder.build(common)
    query = torch.zeros(2, HEADS, 20)
    with pytest.raises(AttentionInputError, match=r"queries of \(6, 19\), expected \(6, 20\)"):
        impl.forward(query[..., :19], None, None, torch.zeros(1, 16, 32), metadata)
    with pytest.raises(AttentionInputError, match="come together"):
        impl.forward(query, torch.zeros(2, 24), None, torch.zeros(1, 16, 32), metadata)
    with pytest.raises(AttentionInputError, match=r"of \(8, 24\), expected \(24, 8\)"):
        impl.forward(query, torch.zeros(2, 8), torch.zeros(2, 24), torch.zeros(1, 16, 32), metadata)
    with pytest.raises(AttentionInputError, match="a cache of shape None"):
        impl.forward(query, None, None, None, metadata)
    with pytest.raises(AttentionInputError, match="custom mask"):
        builder.build(build_metadata([2], [2], [[0]], 16, custom_mask=torch.ones(4, dtype=torch.bool)))


def test_each_phase_can_have_a_backend_of_its_own() -> None:
    seen: list[str] = []

    def watched(name: str) -> type[CpuMLABackend]:
        class Impl(CpuMLAImpl):
            def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                seen.append(name)
                return super().forward(*args, **kwargs)

        return type(name, (CpuMLABackend,), {"name": name, "impl_class": Impl})

    backend = backend_by_phase(watched("PREFILL_MLA"), watched("DECODE_MLA"), [AttentionNeeds(SPEC, torch.float32, 16)])
    assert backend.name == "DECODE_MLA, prefill PREFILL_MLA"
    sequences = Sequences([20])
    tables = shuffled_tables([20], 16)
    cache = poisoned_cache(tables, 16, torch.float32)
    layer = MLAAttention(SPEC, backend, "layer", sequences.weight)
    builder = backend.builder_class(SPEC, torch.float32, 16, torch.device("cpu"))
    pieces = []
    for begin, end in ((0, 19), (19, 20)):
        metadata = builder.build(batch([(end - begin, end)], tables, 16))
        kv_c, k_pe = sequences.latents[0][begin:end].split((MLA.kv_lora_rank, MLA.qk_rope_head_dim), dim=-1)
        with forward_context(ForwardContext({"layer": layer}, {"layer": metadata}, {"layer": cache})):
            pieces.append(layer(sequences.queries[0][begin:end], kv_c, k_pe))
    assert seen == ["PREFILL_MLA", "DECODE_MLA"]
    torch.testing.assert_close(torch.cat(pieces).double(), sequences.expected(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(AttentionBackendError, match="cannot share a KV cache"):
        backend_by_phase(get_backend("CPU_ATTN"), CpuMLABackend, [AttentionNeeds(SPEC, torch.float32, 16)])
