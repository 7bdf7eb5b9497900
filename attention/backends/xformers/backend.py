"""XFORMERS: `xformers.ops.fmha` with block-diagonal masks.

Keys and values are this batch's own when no sequence has others, else gathered from the cache: xFormers reads paged
caches only in some of its operators, and this backend is for where nothing faster runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    refuse_masks,
)
from attention.backends.common.batch_split import gather_kv, kv_rows, token_slots
from attention.backends.common.libraries import load_library
from attention.backends.flash_attn import key_slots
from attention.capability import FLOATS, HOPPER, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.ops.paged_attention import PagedAttention
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType, Feature

_NO_MASKS = "xFormers takes masks only as a bias for every pair of tokens"


@dataclass(frozen=True)
class XFormersMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        bias: which tokens see which, an `xformers.ops.fmha.attn_bias.AttentionBias`.
        rows: (2 * sum of seq_lens,) int64, where all keys and values lie, see `kv_rows`; None: the batch brings them.
    """

    bias: Any
    rows: torch.Tensor | None


class XFormersMetadataBuilder(AttentionMetadataBuilder):
    """Plans batches: the mask, and which keys to gather."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._biases = load_library("xformers", "XFORMERS", "xformers.ops.fmha.attn_bias")

    def build(self, common: CommonAttentionMetadata) -> XFormersMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, XFormersBackend.capabilities.features, XFormersBackend.name)
        decoder = self.spec.attn_type is AttentionType.DECODER
        fresh = decoder and not self.spec.fp8_cache and common.query_lens == common.context_lens
        rows = None
        if self.spec.attn_type.cached and not fresh:
            offsets = torch.zeros_like(common.cu_seqlens_q)
            torch.cumsum(common.seq_lens, 0, out=offsets[1:])
            rows = kv_rows(key_slots(common, offsets, self.block_size), self.block_size)
        return XFormersMetadata(common, self._bias(common), rows)

    def _bias(self, common: CommonAttentionMetadata) -> Any:
        if not common.num_seqs:
            return None
        kind = (
            self._biases.BlockDiagonalCausalFromBottomRightMask if self.spec.causal else self._biases.BlockDiagonalMask
        )
        queries, keys = list(common.query_lens), list(common.context_lens)
        bias = kind.from_seqlens(queries, keys, device=self.device)
        window = self.spec.sliding_window
        if window is None:
            return bias
        local = self._biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask
        return local(q_seqinfo=bias.q_seqinfo, k_seqinfo=bias.k_seqinfo, _window_size=window)


class XFormersImpl(AttentionImpl):
    """One layer's attention."""

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        super().__init__(spec, sinks)
        self._fmha = load_library("xformers", "XFORMERS", "xformers.ops.fmha")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`.

        Raises:
            AttentionInputError: the batch was planned by another backend, or keys are missing.
        """
        if not isinstance(metadata, XFormersMetadata):
            raise AttentionInputError(f"a batch planned for XFORMERS is needed, not {type(metadata).__name__}")
        if key is not None and value is not None and kv_cache is not None:
            PagedAttention.write_to_paged_cache(key, value, kv_cache, metadata.common.slot_mapping, self.kv_scales)
        output = torch.empty_like(query, memory_format=torch.contiguous_format) if output is None else output
        if query.shape[0] == 0:
            return output
        rows = metadata.rows
        if rows is not None or key is None or value is None:
            if kv_cache is None:
                raise AttentionInputError("keys and values are neither given nor in a cache")
            if rows is None:
                rows = kv_rows(token_slots(metadata.common, kv_cache.shape[2]), kv_cache.shape[2])
            key, value = (tensor.to(query.dtype) for tensor in gather_kv(kv_cache, rows))
        fp8 = self.spec.fp8_cache
        scale = self.spec.scale * self.kv_scales.k if fp8 else self.spec.scale
        attended = self._attend(query, key, value, metadata.bias, scale)
        output.copy_(attended * self.kv_scales.v if fp8 else attended)
        return output

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any, scale: float
    ) -> torch.Tensor:
        """Query heads that share a key are given it with a stride of zero, in a dimension of its own."""
        heads, shared = self.spec.num_kv_heads, self.spec.num_heads // self.spec.num_kv_heads
        q, k, v = query[None], key[None], value[None]
        if shared > 1:
            q = q.unflatten(2, (heads, shared))
            k, v = (tensor.unsqueeze(3).expand(-1, -1, -1, shared, -1) for tensor in (k, v))
        attended: torch.Tensor = self._fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias, scale=scale)
        return attended.reshape(query.shape)


class XFormersBackend(AttentionBackend):
    """xFormers' memory-efficient attention."""

    name = "XFORMERS"
    impl_class = XFormersImpl
    metadata_class = XFormersMetadata
    builder_class = XFormersMetadataBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(7, 0), packages=("xformers",), ran_on=(HOPPER,)),),
        dtypes=FLOATS,
        head_sizes=Sizes(8, 256, 8),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.NON_CAUSAL, Feature.SLIDING_WINDOW, Feature.FP8_KV}),
        refused={
            Feature.TREE_MASK: _NO_MASKS,
            Feature.CUSTOM_MASK: _NO_MASKS,
            Feature.ALIBI: "xFormers takes ALiBi only as a bias for every pair of tokens",
            Feature.SOFT_CAP: "xFormers has no soft cap",
            Feature.SINKS: "xFormers returns the denominators of packed softmaxes in no layout that can be relied on",
            Feature.CASCADE: "xFormers attends to every sequence on its own",
        },
        attention_types=tuple(AttentionType),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Windows that look ahead."""
        if needs.spec.sliding_window is not None and not needs.spec.causal:
            return ["xFormers' windows over packed sequences look back only, and this layer looks ahead too"]
        return []
