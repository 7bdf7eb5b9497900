"""Random batches that backends are measured on, of layers with keys and values and of layers with latents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.backend import AttentionBackend, AttentionImpl
from attention.kv_cache import KVCacheSpec, concat_and_cache_mla, reshape_and_cache
from attention.metadata import CommonAttentionMetadata, build_metadata
from attention.selection.reference import reference_attention
from attention.spec import AttentionNeeds, AttentionSpec, MLASpec

_FILL_BYTES = 64 << 20


@dataclass(frozen=True)
class Batch:
    """A batch with its tensors; every cache holds the whole context of all sequences.

    Attributes:
        common: the batch.
        query: (T, Hq, D); of latent attention (T, Hq, qk_nope_head_dim + qk_rope_head_dim).
        key: (T, Hkv, D); or (T, kv_lora_rank) latents.
        value: (T, Hkv, D); or (T, qk_rope_head_dim) rotary keys.
        caches: of one layer each, alike.
        weight: what a layer has beside its spec: sinks, or `kv_b_proj`.
    """

    common: CommonAttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    caches: Sequence[torch.Tensor]
    weight: torch.Tensor | None

    def output(self, spec: AttentionSpec) -> torch.Tensor:
        """Room for a layer's output, NaN everywhere."""
        size = spec.head_size if spec.mla is None else spec.mla.v_head_dim
        return torch.full_like(self.query[..., :1], float("nan")).repeat(1, 1, size)


def draw(needs: AttentionNeeds, lens: Sequence[tuple[int, int]], device: torch.device, num_caches: int) -> Batch:
    """Random tensors and shuffled blocks for sequences of (new tokens, tokens in all)."""
    spec, block_size, mla = needs.spec, needs.block_size, needs.spec.mla
    needed = [-(-context // block_size) for _, context in lens]
    blocks = list(range(sum(needed)))
    random.Random(0).shuffle(blocks)
    tables = [[blocks.pop() for _ in range(n)] for n in needed]
    common = build_metadata([q for q, _ in lens], [c for _, c in lens], tables, block_size, device)
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(q for q, _ in lens)
    of_heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    shapes: list[tuple[int, ...]] = [(tokens, heads, spec.head_size) for heads in of_heads]
    if mla is not None:
        head_size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        shapes = [(tokens, spec.num_heads, head_size), (tokens, mla.kv_lora_rank), (tokens, mla.qk_rope_head_dim)]
    query, key, value = (torch.randn(shape, generator=generator, device=device).to(needs.dtype) for shape in shapes)
    cache_spec = cache_of(needs, num_caches)
    cache = torch.empty(cache_spec.shape(sum(needed)), dtype=cache_spec.dtype, device=device)
    for part in cache.flatten(0, 1).split(max(1, _FILL_BYTES // cache[0, 0].numel() // 4)):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    return Batch(common, query, key, value, cache.unbind(0), _weight(needs, device))


def cache_of(needs: AttentionNeeds, num_layers: int) -> KVCacheSpec:
    """The cache of so many layers."""
    spec = needs.spec
    return KVCacheSpec(
        tuple(range(num_layers)),
        spec.num_kv_heads,
        spec.head_size,
        needs.block_size,
        spec.kv_cache_dtype or needs.dtype,
        kind="full" if spec.mla is None else "mla",
    )


def implementation(backend: type[AttentionBackend], spec: AttentionSpec, batch: Batch) -> AttentionImpl:
    """A layer with the batch's weight."""
    impl: AttentionImpl = backend.impl_class(spec, batch.weight)
    return impl


def expected_output(needs: AttentionNeeds, batch: Batch, lens: Sequence[tuple[int, int]]) -> torch.Tensor:
    """What a layer should answer on the first cache, (T, Hq, …) float32; the cache is left as it is."""
    spec, mla, cache = needs.spec, needs.spec.mla, batch.caches[0].clone()
    slots = batch.common.slot_mapping
    if mla is None:
        reshape_and_cache(batch.key, batch.value, cache, slots)
    else:
        concat_and_cache_mla(batch.key, batch.value, cache, slots)
    expected = []
    for i, query in enumerate(batch.query.split([q for q, _ in lens])):
        table, context = batch.common.block_tables[i].long(), lens[i][1]
        if mla is None:
            key, value = cache.float()[table].transpose(0, 1).flatten(1, 2)[:, :context]
            expected.append(reference_attention(spec, query, key, value, batch.weight))
        else:
            latents = cache.float()[table].flatten(0, 1)[:context]
            expected.append(_attend_latents(spec, mla, query, latents, batch.weight))
    return torch.cat(expected)


def _attend_latents(
    spec: AttentionSpec, mla: MLASpec, query: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    assert weight is not None
    kv_c, rotary = latents.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
    heads = (kv_c @ weight.float().T).unflatten(1, (spec.num_heads, -1))
    nope, value = heads.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)
    key = torch.cat((nope, rotary.unsqueeze(1).expand(-1, spec.num_heads, -1)), dim=-1)
    ordinary = AttentionSpec(spec.num_heads, spec.num_heads, query.shape[-1], spec.scale)
    return reference_attention(ordinary, query, key, value)


def _weight(needs: AttentionNeeds, device: torch.device) -> torch.Tensor | None:
    generator, spec, mla = torch.Generator(device).manual_seed(1), needs.spec, needs.spec.mla
    if mla is not None:
        shape = (spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        weight = torch.randn(shape, generator=generator, device=device).mul_(mla.kv_lora_rank**-0.5)
        return weight.to(needs.dtype)
    return torch.randn(spec.num_heads, generator=generator, device=device) if spec.has_sinks else None
