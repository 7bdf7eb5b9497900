"""CPU_MLA: multi-head latent attention in plain torch, one sequence at a time.

Latents are gathered token by token, never block by block: the unused slots of a last block may hold anything, and a
weight of zero does not tame a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812

from attention.backend import AttentionMetadata, AttentionMetadataBuilder
from attention.backends.common.batch_split import BatchSplit, PrefillPart, put, split_batch, take
from attention.backends.mla.base import MLABackend, MLAImpl, refuse_all_masks
from attention.capability import FLOATS, X86, Capabilities, DeviceSupport
from attention.fp8 import dequantize
from attention.kv_cache import concat_and_cache_mla, take_rows
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind
from attention.spec import FP8, Feature

TILE = 256
"""Query rows that attend together in prefill: bounds the mask, and keys that a tile cannot see are left out."""


@dataclass(frozen=True)
class CpuMLAMetadata(AttentionMetadata):
    """A batch in its two parts, with the slots of its decoding sequences.

    Attributes:
        split: the parts.
        decode_slots: for each sequence that decodes, (S,) int64, the slots of its tokens.
    """

    split: BatchSplit
    decode_slots: tuple[torch.Tensor, ...]


class CpuMLABuilder(AttentionMetadataBuilder):
    """Finds every token's slot once for all layers."""

    def build(self, common: CommonAttentionMetadata) -> CpuMLAMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_all_masks(common)
        split = split_batch(common, self.block_size)
        slots: tuple[torch.Tensor, ...] = ()
        if split.decode is not None:
            tables = split.decode.block_tables.long()
            positions = [torch.arange(n) for n in split.decode.context_lens]
            slots = tuple(
                table[at // self.block_size] * self.block_size + at % self.block_size
                for table, at in zip(tables, positions, strict=True)
            )
        return CpuMLAMetadata(common, split, slots)


class CpuMLAImpl(MLAImpl):
    """One layer through `scaled_dot_product_attention`."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new latents in the cache, then attend over the whole sequences; arguments as of `MLAImpl`.

        Raises:
            AttentionInputError: tensors that do not fit the layer.
        """
        batch = cast(CpuMLAMetadata, metadata)
        cache = self.checked_cache(query, key, value, kv_cache)
        if key is not None and value is not None:
            concat_and_cache_mla(key, value, cache, batch.common.slot_mapping, self.kv_scales.k)
        if output is None:
            shape = (query.shape[0], self.spec.num_heads, self.mla.v_head_dim)
            output = torch.empty(shape, dtype=query.dtype, device=query.device)
        prefill, decode = batch.split.prefill, batch.split.decode
        if prefill is not None:
            put(output, prefill.tokens, self._prefill(take(query, prefill.tokens), cache, prefill))
        if decode is not None:
            put(output, decode.tokens, self._decode(take(query, decode.tokens), cache, batch.decode_slots))
        return output

    def _prefill(self, query: torch.Tensor, kv_cache: torch.Tensor, part: PrefillPart) -> torch.Tensor:
        """Sequences that bring several tokens, over keys and values expanded from their latents."""
        latents = self._gather(kv_cache, part.slots, query.dtype).split(list(part.context_lens))
        queries = query.split(list(part.query_lens))
        return torch.cat([self._attend(q, latent) for q, latent in zip(queries, latents, strict=True)])

    def _decode(self, query: torch.Tensor, kv_cache: torch.Tensor, slots: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sequences that bring one token, in the latents' space."""
        nope, rope = query.split((self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim), dim=-1)
        absorbed = torch.cat((torch.einsum("bhn,hnr->bhr", nope, self.w_uk), rope), dim=-1)
        attended = []
        for q, slots_of_sequence in zip(absorbed, slots, strict=True):
            latent = self._gather(kv_cache, slots_of_sequence, query.dtype)
            attended.append(
                F.scaled_dot_product_attention(
                    q[None, None],
                    latent[None, None],
                    latent[None, None, :, : self.mla.kv_lora_rank],
                    scale=self.spec.scale,
                )[0, 0]
            )
        return torch.einsum("bhr,hvr->bhv", torch.stack(attended), self.w_uv)

    def _attend(self, query: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The last tokens of one sequence, (n, Hq, Dqk), to its latents, (S, latent size): (n, Hq, Dv)."""
        heads = self.spec.num_heads
        c, k_pe = latent.split((self.mla.kv_lora_rank, self.mla.qk_rope_head_dim), dim=-1)
        keys = torch.cat((torch.einsum("sr,hnr->hsn", c, self.w_uk), k_pe.expand(heads, -1, -1)), dim=-1)
        values = torch.einsum("sr,hvr->hsv", c, self.w_uv)
        prefix = latent.shape[0] - query.shape[0]
        tiles = []
        for begin in range(0, query.shape[0], TILE):
            tile = query[begin : begin + TILE].transpose(0, 1)
            end = prefix + begin + tile.shape[1]
            seen = torch.arange(end) <= torch.arange(prefix + begin, end)[:, None]
            tiles.append(
                F.scaled_dot_product_attention(
                    tile, keys[:, :end], values[:, :end], attn_mask=seen, scale=self.spec.scale
                ).transpose(0, 1)
            )
        return torch.cat(tiles)

    def _gather(self, kv_cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stored = take_rows(kv_cache.view(-1, self.mla.latent_size), slots)
        return dequantize(stored, self.kv_scales.k).to(dtype) if stored.dtype == FP8 else stored


class CpuMLABackend(MLABackend):
    """Multi-head latent attention on a CPU."""

    name = "CPU_MLA"
    impl_class = CpuMLAImpl
    metadata_class = CpuMLAMetadata
    builder_class = CpuMLABuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CPU, ran_on=(X86,)),),
        dtypes=FLOATS,
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.FP8_KV}),
        mla=True,
    )
