"""ROCM_ATTN: the Triton kernels of TRITON_ATTN on AMD GPUs, with the sequences of a mixed batch told apart.

As in vLLM, sequences that decode run with the split-KV decode kernel even when others of their batch bring a prompt or
a chunk, which run with the prefill kernel. Queries of either kind are gathered and their results scattered, which costs
little beside attention; a batch of one kind is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from attention.backend import AttentionMetadata
from attention.backends.common.batch_split import put, take
from attention.backends.triton_attn.backend import (
    TritonAttnBackend,
    TritonAttnImpl,
    TritonAttnMetadata,
    TritonAttnMetadataBuilder,
)
from attention.capability import DeviceSupport
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionType


@dataclass(frozen=True)
class Part:
    """Sequences of one kind in a mixed batch.

    Attributes:
        tokens: (Tp,) int64, their rows in T.
        plan: the sequences as a batch of their own.
    """

    tokens: torch.Tensor
    plan: TritonAttnMetadata


@dataclass(frozen=True)
class RocmAttnMetadata(TritonAttnMetadata):
    """A planned batch.

    Attributes:
        parts: what a mixed batch falls into; empty for a batch of one kind.
    """

    parts: tuple[Part, ...] = ()


class RocmAttnBuilder(TritonAttnMetadataBuilder):
    """Splits a mixed batch of a decoder, and plans its parts."""

    def build(self, common: CommonAttentionMetadata) -> RocmAttnMetadata:
        """See `AttentionMetadataBuilder.build`."""
        plan = super().build(common)
        parts: tuple[Part, ...] = ()
        mixed = not common.decode_only and 1 in common.query_lens
        if mixed and not common.features and self.spec.attn_type is AttentionType.DECODER:
            single = np.asarray(common.query_lens) == 1
            parts = tuple(self._part(common, np.flatnonzero(chosen)) for chosen in (single, ~single))
        shared = {field.name: getattr(plan, field.name) for field in fields(plan)}
        return RocmAttnMetadata(**shared, parts=parts)

    def _part(self, common: CommonAttentionMetadata, sequences: np.ndarray) -> Part:
        device = common.seq_lens.device
        lens = np.asarray(common.query_lens, dtype=np.int64)
        first = np.cumsum(lens) - lens
        offsets = np.zeros(len(sequences) + 1, dtype=np.int32)
        np.cumsum(lens[sequences], out=offsets[1:])
        chosen = torch.from_numpy(sequences).to(device)
        part = replace(
            common,
            cu_seqlens_q=torch.from_numpy(offsets).to(device),
            seq_lens=common.seq_lens[chosen],
            block_tables=common.block_tables[chosen],
            query_lens=tuple(common.query_lens[i] for i in sequences),
            context_lens=tuple(common.context_lens[i] for i in sequences),
            common_prefix_len=0,
        )
        tokens = np.concatenate([np.arange(first[i], first[i] + lens[i]) for i in sequences])
        return Part(torch.from_numpy(tokens).to(device), super().build(part))


class RocmAttnImpl(TritonAttnImpl):
    """Stores all keys and values, then attends part by part."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `metadata` is a `RocmAttnMetadata`."""
        assert isinstance(metadata, RocmAttnMetadata)
        if not metadata.parts:
            return super().forward(query, key, value, kv_cache, metadata, output)
        if kv_cache is None:
            raise AttentionInputError("a decoder's attention needs a KV cache")
        if key is not None and value is not None:
            self._store(key, value, kv_cache, metadata)
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part in metadata.parts:
            put(output, part.tokens, super().forward(take(query, part.tokens), None, None, kv_cache, part.plan))
        return output

    def _store(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: RocmAttnMetadata
    ) -> None:
        from attention.ops.triton.reshape_and_cache import reshape_and_cache

        scales = self.kv_scales
        reshape_and_cache(key, value, kv_cache, metadata.common.slot_mapping, k_scale=scales.k, v_scale=scales.v)


class RocmAttnBackend(TritonAttnBackend):
    """The Triton kernels on AMD GPUs."""

    name = "ROCM_ATTN"
    impl_class = RocmAttnImpl
    metadata_class = RocmAttnMetadata
    builder_class = RocmAttnBuilder
    capabilities = replace(
        TritonAttnBackend.capabilities,
        devices=(DeviceSupport(DeviceKind.ROCM, packages=("triton",)),),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """See `AttentionBackend.refuse_more`: as TRITON_ATTN, on AMD GPUs."""
        return super().refuse_more(platform, needs) if platform.kind is DeviceKind.ROCM else []
