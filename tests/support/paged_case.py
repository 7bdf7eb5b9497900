"""A batch of a decoder over one layer's paged cache, for tests that build a backend by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, KVScales
from attention.fp8 import quantize
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.spec import FP8, AttentionSpec
from attention_reference import attend, fp8_round_trip, visible_keys

MIXED = ((1, 33), (20, 20), (1, 16), (7, 40), (1, 1), (17, 64))
"""(query tokens, tokens in all) of sequences that decode, of whole prompts and of chunks, in turn."""


@dataclass(frozen=True)
class PagedCase:
    """What a backend is given, and what it should answer.

    Attributes:
        query: (T, Hq, D), a strided cut of one projection, as are `key` and `value`.
        key: (T, Hkv, D).
        value: (T, Hkv, D).
        cache: (num_blocks, 2, block_size, Hkv, D): earlier tokens in shuffled blocks, NaN wherever no token is.
        expected: (T, Hq, D) float64.
    """

    spec: AttentionSpec
    common: CommonAttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    scales: KVScales
    sinks: torch.Tensor | None
    expected: torch.Tensor

    def run(self, backend: type[AttentionBackend], output: torch.Tensor | None = None) -> torch.Tensor:
        """Plan the batch and attend; the cache is written."""
        builder = backend.builder_class(self.spec, self.query.dtype, self.cache.shape[2], self.query.device)
        impl = backend.impl_class(self.spec, self.sinks)
        impl.kv_scales = self.scales
        return impl.forward(self.query, self.key, self.value, self.cache, builder.build(self.common), output)


def paged_case(
    spec: AttentionSpec,
    lens: Sequence[tuple[int, int]] = MIXED,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedCase:
    """Random tensors for sequences of (query tokens, tokens in all)."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
    scales = KVScales(0.02, 0.03) if spec.kv_cache_dtype == FP8 else KVScales()
    tables = shuffled_tables([context for _, context in lens], block_size, seed)
    num_blocks = sum(map(len, tables)) + 2
    cache = torch.full((num_blocks, 2, block_size, kv_heads, size), float("nan"), dtype=spec.kv_cache_dtype or dtype)
    fused, expected = [], []
    for (query_len, context), table in zip(lens, tables, strict=True):
        qkv = torch.randn(context, heads + 2 * kv_heads, size, generator=generator).to(dtype)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        for position in range(context - query_len):
            block, offset = table[position // block_size], position % block_size
            cache[block, 0, offset] = _stored(key[position], scales.k, cache.dtype)
            cache[block, 1, offset] = _stored(value[position], scales.v, cache.dtype)
        if cache.dtype == FP8:
            key, value = fp8_round_trip(key, scales.k), fp8_round_trip(value, scales.v)
        fused.append(qkv[context - query_len :])
        seen = visible_keys(spec, query_len, context)
        expected.append((query[context - query_len :], key, value, seen))
    sinks = torch.randn(heads, generator=generator) if spec.has_sinks else None
    query, key, value = torch.cat(fused).split((heads, kv_heads, kv_heads), dim=1)
    common = build_metadata([q for q, _ in lens], [c for _, c in lens], tables, block_size)
    answers = torch.cat([attend(q, k, v, spec, seen, sinks) for q, k, v, seen in expected])
    return PagedCase(spec, common, query, key, value, cache, scales, sinks, answers)


def shuffled_tables(contexts: Sequence[int], block_size: int, seed: int = 0) -> list[list[int]]:
    """Blocks for sequences of these lengths, in no order; two more than they need exist."""
    needed = [-(-context // block_size) for context in contexts]
    blocks = list(range(sum(needed) + 2))
    random.Random(seed).shuffle(blocks)
    return [[blocks.pop() for _ in range(n)] for n in needed]


def _stored(tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return quantize(tensor, scale) if dtype == FP8 else tensor
