"""ROCM_FLASH: flash attention over contiguous keys for prefill, paged decode, on AMD GPUs (vLLM's first ROCm backend).

A prompt without a cached prefix attends to the keys that the layer just computed; one with a prefix first copies its
keys and values out of the cache, which costs writing and reading them once more per layer. Prefill runs the
`flash_attn` package (Composable Kernel) where it is installed and knows the layer's features, else our Triton kernel;
decode runs our Triton kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.backends.common.batch_split import (
    BatchSplit,
    DecodePart,
    PrefillPart,
    gather_kv,
    kv_rows,
    put,
    split_batch,
    take,
)
from attention.backends.triton_attn.backend import POWERS_OF_TWO
from attention.capability import FLOATS, HALVES, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.fp8 import dequantize
from attention.kv_cache import reshape_and_cache
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind
from attention.spec import AttentionSpec, Feature


@dataclass(frozen=True)
class RocmFlashMetadata(AttentionMetadata):
    """A batch in its two parts."""

    split: BatchSplit


class RocmFlashBuilder(AttentionMetadataBuilder):
    """Splits batches into prefill and decode."""

    def build(self, common: CommonAttentionMetadata) -> RocmFlashMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, RocmFlashBackend.capabilities.features, RocmFlashBackend.name)
        return RocmFlashMetadata(common, split_batch(common, self.block_size))


class RocmFlashImpl(AttentionImpl):
    """One layer: contiguous flash prefill, paged decode."""

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        super().__init__(spec, sinks)
        # Composable Kernel ignores a soft cap and knows no sinks.
        self._composable_kernel = None if spec.has_sinks or spec.logits_soft_cap is not None else composable_kernel()
        self._slopes: torch.Tensor | None = None

    @property
    def has_composable_kernel(self) -> bool:
        """Whether prompts of half precision are computed by the `flash_attn` package."""
        return self._composable_kernel is not None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `metadata` is a `RocmFlashMetadata`."""
        split = cast(RocmFlashMetadata, metadata).split
        if kv_cache is None:
            raise AttentionInputError("ROCM_FLASH needs a KV cache")
        if key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, metadata.common.slot_mapping, self.kv_scales)
        if output is None:
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.spec.alibi_slopes is not None and self._slopes is None:
            self._slopes = torch.tensor(self.spec.alibi_slopes, dtype=torch.float32, device=query.device)
        if split.prefill is not None:
            self._prefill(query, key, value, kv_cache, split.prefill, output)
        if split.decode is not None:
            self._decode(query, kv_cache, split.decode, output)
        return output

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        part: PrefillPart,
        output: torch.Tensor,
    ) -> None:
        queries = take(query, part.tokens)
        if part.whole and key is not None and value is not None and not self.spec.fp8_cache:
            keys, values = take(key, part.tokens), take(value, part.tokens)
        else:
            keys, values = gather_kv(kv_cache, kv_rows(part.slots, kv_cache.shape[2]))
            if self.spec.fp8_cache:
                keys = dequantize(keys, self.kv_scales.k).to(query.dtype)
                values = dequantize(values, self.kv_scales.v).to(query.dtype)
        if self._composable_kernel is not None and query.dtype in HALVES:
            window = self.spec.sliding_window
            attended = self._composable_kernel(
                queries,
                keys,
                values,
                part.cu_seqlens_q,
                part.cu_seqlens_k,
                max(part.query_lens),
                max(part.context_lens),
                softmax_scale=self.spec.scale,
                causal=True,
                window_size=(-1, -1) if window is None else (window - 1, 0),
                alibi_slopes=self._slopes,
            )
            put(output, part.tokens, attended)
            return
        from attention.ops.triton.prefill import varlen_prefill

        attended = output if part.tokens is None else torch.empty_like(queries)
        varlen_prefill(
            queries,
            keys,
            values,
            part.cu_seqlens_q,
            part.cu_seqlens_k,
            max(part.query_lens),
            attended,
            scale=self.spec.scale,
            sliding_window=self.spec.sliding_window,
            soft_cap=self.spec.logits_soft_cap,
            alibi_slopes=self._slopes,
            sinks=self.sinks,
        )
        if part.tokens is not None:
            put(output, part.tokens, attended)

    def _decode(self, query: torch.Tensor, kv_cache: torch.Tensor, part: DecodePart, output: torch.Tensor) -> None:
        from attention.ops.triton.decode import paged_decode

        queries = take(query, part.tokens)
        attended = output if part.tokens is None else torch.empty_like(queries)
        paged_decode(
            queries,
            kv_cache,
            part.block_tables,
            part.seq_lens,
            max(part.context_lens),
            attended,
            scale=self.spec.scale,
            sliding_window=self.spec.sliding_window,
            soft_cap=self.spec.logits_soft_cap,
            alibi_slopes=self._slopes,
            sinks=self.sinks,
            k_scale=self.kv_scales.k,
            v_scale=self.kv_scales.v,
        )
        if part.tokens is not None:
            put(output, part.tokens, attended)


class RocmFlashBackend(AttentionBackend):
    """Flash prefill over contiguous keys and Triton paged decode on AMD GPUs."""

    name = "ROCM_FLASH"
    impl_class = RocmFlashImpl
    metadata_class = RocmFlashMetadata
    builder_class = RocmFlashBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.ROCM, packages=("triton",)),),
        dtypes=FLOATS,
        head_sizes=Sizes(high=256),
        block_sizes=POWERS_OF_TWO,
        features=frozenset(
            {
                Feature.GQA,
                Feature.PREFIX,
                Feature.SLIDING_WINDOW,
                Feature.ALIBI,
                Feature.SOFT_CAP,
                Feature.SINKS,
                Feature.FP8_KV,
            }
        ),
        refused={
            Feature.CUSTOM_MASK: "flash attention over contiguous keys takes no mask",
            Feature.TREE_MASK: "flash attention over contiguous keys takes no mask",
        },
    )


def composable_kernel() -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the `flash_attn` package (on ROCm: Composable Kernel); None where it is missing."""
    try:
        module = importlib.import_module("flash_attn")
    except ImportError:
        return None
    function: Callable[..., Any] = module.flash_attn_varlen_func
    return function
