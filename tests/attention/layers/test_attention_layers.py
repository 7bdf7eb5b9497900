"""Chunked local, cross and encoder-only attention over the CPU's backends, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from attention.backend import KVScales
from attention.errors import AttentionInputError
from attention.forward_context import ForwardContext, forward_context
from attention.kv_cache import KVCacheSpec
from attention.layers.attention import Attention
from attention.layers.chunked_local_attention import ChunkedLocalAttention, split_into_chunks
from attention.layers.cross_attention import CrossAttention, build_cross_metadata
from attention.layers.encoder_only_attention import EncoderOnlyAttention
from attention.metadata import CommonAttentionMetadata, build_encoder_metadata, build_metadata
from attention.selection.registry import get_backend
from attention.spec import FP8, AttentionSpec, AttentionType
from attention_reference import attend, fp8_round_trip, visible_keys
from paged_case import MIXED, paged_case, shuffled_tables

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 16, 8
DECODER = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE**-0.5)
CROSS = replace(DECODER, attn_type=AttentionType.ENCODER_DECODER)
ENCODER = replace(DECODER, attn_type=AttentionType.ENCODER_ONLY)
BACKENDS = ("TORCH_SDPA", "CPU_ATTN")


def run(
    layer: Attention,
    common: CommonAttentionMetadata,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cache: torch.Tensor | None,
) -> torch.Tensor:
    builder = layer.backend.builder_class(layer.spec, query.dtype, BLOCK, query.device)
    caches = {} if cache is None else {layer.name: cache}
    with forward_context(ForwardContext({layer.name: layer}, {layer.name: builder.build(common)}, caches)):
        attended: torch.Tensor = layer(query, key, value)
    return attended


def poisoned_cache(num_blocks: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    cache = KVCacheSpec((0,), KV_HEADS, SIZE, BLOCK, dtype).allocate(num_blocks, "cpu")[0]
    if dtype == FP8:
        cache.view(torch.uint8).fill_(0x7F)
        return cache
    return cache.fill_(float("nan"))


def chunk_mask(num_queries: int, num_keys: int, chunk: int) -> torch.Tensor:
    """(n, S) bool by the definition: no key behind the query, and none of another chunk."""
    positions = torch.arange(num_keys)
    queries = positions[num_keys - num_queries :, None]
    return (positions <= queries) & (positions // chunk == queries // chunk)


@pytest.mark.parametrize("chunk", [8, 16, 24, 1024])
@pytest.mark.parametrize("name", BACKENDS)
def test_chunked_local_attention_of_a_prompt_in_pieces(name: str, chunk: int) -> None:
    """Prompts come whole, in pieces that begin and end anywhere, and token by token."""
    layer = ChunkedLocalAttention(DECODER, get_backend(name), "layer", chunk)
    lengths, steps = (1, 8, 61, 40), ((1, 8, 20, 7), (0, 0, 40, 1), (0, 0, 1, 32))
    tables = shuffled_tables(lengths, BLOCK)
    cache = poisoned_cache(sum(map(len, tables)) + 2)
    generator = torch.Generator().manual_seed(chunk)
    qkv = [torch.randn(n, HEADS + 2 * KV_HEADS, SIZE, generator=generator) for n in lengths]
    done = [0] * len(lengths)
    for step in steps:
        active = [i for i, n in enumerate(step) if n]
        contexts = [done[i] + step[i] for i in active]
        common = build_metadata([step[i] for i in active], contexts, [tables[i] for i in active], BLOCK)
        tokens = torch.cat([qkv[i][done[i] : done[i] + step[i]] for i in active])
        answered = run(layer, common, *tokens.split((HEADS, KV_HEADS, KV_HEADS), dim=1), cache)
        expected = []
        for i, context in zip(active, contexts, strict=True):
            query, key, value = qkv[i][:context].split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            seen = chunk_mask(step[i], context, chunk)
            expected.append(attend(query[done[i] :], key, value, DECODER, seen))
            done[i] = context
        torch.testing.assert_close(answered.double(), torch.cat(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_chunked_local_attention_with_other_features(name: str) -> None:
    """A sliding window inside the chunks, ALiBi and sinks are the inner backend's as ever."""
    spec = replace(DECODER, sliding_window=5, alibi_slopes=(0.5, 0.25, 0.1, 0.05), has_sinks=True)
    case = paged_case(spec, [(20, 20)], BLOCK)
    layer = ChunkedLocalAttention(spec, get_backend(name), "layer", 16, sinks=case.sinks)
    answered = run(layer, case.common, case.query, case.key, case.value, case.cache)
    seen = chunk_mask(20, 20, 16) & visible_keys(spec, 20, 20)
    expected = attend(case.query, case.key, case.value, spec, seen, case.sinks)
    torch.testing.assert_close(answered.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_chunk_is_plain_attention(name: str) -> None:
    case = paged_case(DECODER, MIXED, BLOCK)
    layer = ChunkedLocalAttention(DECODER, get_backend(name), "layer", 4096)
    answered = run(layer, case.common, case.query, case.key, case.value, case.cache)
    torch.testing.assert_close(answered.double(), case.expected, rtol=2e-5, atol=2e-5)


def test_chunks_become_sequences() -> None:
    common = build_metadata([1, 15], [10, 26], [[7, 3], [5, 1, 9, 2]], BLOCK)
    split = split_into_chunks(common, 16, BLOCK)
    assert split.query_lens == (1, 5, 10)
    assert split.context_lens == (10, 16, 10)
    assert split.cu_seqlens_q.tolist() == [0, 1, 6, 16]
    assert split.seq_lens.tolist() == [10, 16, 10]
    assert split.block_tables.tolist() == [[7, 3], [5, 1], [9, 2]]
    assert torch.equal(split.slot_mapping, common.slot_mapping)
    assert split_into_chunks(build_metadata([], [], [], BLOCK), 16, BLOCK).num_seqs == 0


def test_what_chunked_local_attention_refuses() -> None:
    backend = get_backend("CPU_ATTN")
    with pytest.raises(AttentionInputError, match="at least 1 token, not 0"):
        ChunkedLocalAttention(DECODER, backend, "layer", 0)
    with pytest.raises(AttentionInputError, match="for decoders, not for encoder_only"):
        ChunkedLocalAttention(ENCODER, backend, "layer", 16)
    chunked = ChunkedLocalAttention(DECODER, backend, "layer", 20).backend
    with pytest.raises(AttentionInputError, match="chunks of 20 tokens are not whole blocks of 8"):
        chunked.builder_class(DECODER, torch.float32, BLOCK, torch.device("cpu"))
    builder = ChunkedLocalAttention(DECODER, backend, "layer", 16).backend.builder_class(
        DECODER, torch.float32, BLOCK, torch.device("cpu")
    )
    tree = build_metadata([2], [9], [[0, 1]], BLOCK, tree_mask=torch.eye(2, dtype=torch.bool))
    with pytest.raises(AttentionInputError, match="tree mask does not go with chunked local"):
        builder.build(tree)


def test_layers_of_one_kind_share_a_backend() -> None:
    backend = get_backend("CPU_ATTN")
    first, second, other = (ChunkedLocalAttention(DECODER, backend, f"{i}", n) for i, n in enumerate((16, 16, 32)))
    assert first.backend is second.backend
    assert first.backend is not other.backend
    assert issubclass(first.backend, backend)


def encoder_tokens(lengths: Sequence[int], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = ([torch.randn(n, KV_HEADS, SIZE, generator=generator) for n in lengths] for _ in range(2))
    return keys, values


@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
@pytest.mark.parametrize("name", BACKENDS)
def test_cross_attention_stores_once_and_finds_it_later(name: str, cache_dtype: torch.dtype) -> None:
    """Two sequences begin, then go on while a third one begins, then all go on."""
    spec = replace(CROSS, kv_cache_dtype=FP8 if cache_dtype == FP8 else None)
    scales = KVScales(0.02, 0.03)
    layer = CrossAttention(spec, get_backend(name), "cross", kv_scales=scales if cache_dtype == FP8 else None)
    lengths = (5, 30, 17)
    tables = shuffled_tables(lengths, BLOCK)
    keys, values = encoder_tokens(lengths, 3)
    cache = poisoned_cache(sum(map(len, tables)) + 2, cache_dtype)
    steps = [([4, 9], [True, True]), ([1, 1, 3], [False, False, True]), ([1, 1, 1], None)]
    for queries, first in steps:
        count = len(queries)
        common = build_cross_metadata(queries, lengths[:count], tables[:count], BLOCK, first_step=first)
        new = [i for i in range(count) if first is not None and first[i]]
        key = torch.cat([keys[i] for i in new]) if new else None
        value = torch.cat([values[i] for i in new]) if new else None
        query = torch.randn(sum(queries), HEADS, SIZE)
        answered = run(layer, common, query, key, value, cache)
        expected = []
        for i, one in enumerate(query.split(queries)):
            k, v = keys[i], values[i]
            if cache_dtype == FP8:
                k, v = fp8_round_trip(k, scales.k), fp8_round_trip(v, scales.v)
            expected.append(attend(one, k, v, spec, torch.ones(one.shape[0], lengths[i], dtype=torch.bool)))
        torch.testing.assert_close(answered.double(), torch.cat(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_cross_attention_to_no_tokens_gives_zeros(name: str) -> None:
    layer = CrossAttention(CROSS, get_backend(name), "cross")
    common = build_cross_metadata([1, 3, 2], [0, 4, 0], [[], [1], []], BLOCK, first_step=[True, True, True])
    (key,), (value,) = encoder_tokens([4], 0)
    answered = run(layer, common, torch.randn(6, HEADS, SIZE), key, value, poisoned_cache(2))
    assert answered.isfinite().all()
    assert not answered[0].any()
    assert answered[1:4].all()
    assert not answered[4:].any()


def test_what_cross_attention_refuses() -> None:
    backend = get_backend("CPU_ATTN")
    with pytest.raises(AttentionInputError, match="encoder_decoder, not decoder"):
        CrossAttention(DECODER, backend, "cross")
    layer = CrossAttention(CROSS, backend, "cross")
    common = build_cross_metadata([1], [5], [[0]], BLOCK, first_step=[True])
    query = torch.randn(1, HEADS, SIZE)
    with pytest.raises(AttentionInputError, match="keys of 0 encoder tokens, the batch has 5"):
        run(layer, common, query, None, None, poisoned_cache(1))
    (key,), (value,) = encoder_tokens([5], 0)
    later = build_cross_metadata([1], [5], [[0]], BLOCK)
    with pytest.raises(AttentionInputError, match="keys of 5 encoder tokens, the batch has 0"):
        run(layer, later, query, key, value, poisoned_cache(1))
    with pytest.raises(AttentionInputError, match="sequence 0: 1 queries, 9 encoder tokens in 1 blocks"):
        build_cross_metadata([1], [9], [[0]], BLOCK)
    with pytest.raises(AttentionInputError, match="2 queries, 1 encoder lengths"):
        build_cross_metadata([1, 1], [9], [[0, 1]], BLOCK)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", [AttentionType.ENCODER_ONLY, AttentionType.ENCODER])
@pytest.mark.parametrize("name", BACKENDS)
def test_encoder_only_attention_sees_both_ways(name: str, kind: AttentionType, window: int | None) -> None:
    spec = replace(ENCODER, attn_type=kind, sliding_window=window)
    layer = EncoderOnlyAttention(spec, get_backend(name), "encoder")
    lengths = [1, 7, 40, 2]
    query, key, value = torch.randn(50, HEADS + 2 * KV_HEADS, SIZE).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    answered = run(layer, build_encoder_metadata(lengths), query, key, value, None)
    sequences = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = [attend(q, k, v, spec, visible_keys(spec, len(q), len(q))) for q, k, v in sequences]
    torch.testing.assert_close(answered.double(), torch.cat(expected), rtol=2e-5, atol=2e-5)


def test_what_encoder_only_attention_refuses() -> None:
    with pytest.raises(AttentionInputError, match="decoder attention has a KV cache"):
        EncoderOnlyAttention(DECODER, get_backend("CPU_ATTN"), "encoder")
    without = get_backend("TREE_ATTN")
    assert AttentionType.ENCODER_ONLY not in without.capabilities.attention_types
    with pytest.raises(AttentionInputError, match="TREE_ATTN has no encoder_only attention"):
        EncoderOnlyAttention(ENCODER, without, "encoder")
    with pytest.raises(AttentionInputError, match="TREE_ATTN has no cross attention"):
        CrossAttention(CROSS, without, "cross")
