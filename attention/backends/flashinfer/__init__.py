"""FLASHINFER: the kernels of FlashInfer (arXiv:2501.01005), each for the batches that it is best at.

Prefill of whole prompts runs on the batch's own keys (ragged), all other batches on the paged cache: by FlashAttention
3's scheme on Hopper, else by FlashAttention 2's. Decode runs in XQA where that can, else in FlashInfer's own kernels. A
prefix that many sequences share is attended to once for all. The kernels are compiled when they first run.
"""

from __future__ import annotations

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata
from attention.backends.flashinfer.builder import FlashInferMetadata, FlashInferMetadataBuilder
from attention.backends.flashinfer.choice import refuse_combinations
from attention.backends.flashinfer.plans import Tensors
from attention.capability import HALVES, HOPPER, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.ops.paged_attention import PagedAttention
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionType, Feature

__all__ = ["FlashInferBackend", "FlashInferImpl", "FlashInferMetadata", "FlashInferMetadataBuilder"]


class FlashInferImpl(AttentionImpl):
    """One layer's attention."""

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
            AttentionInputError: the batch was planned by another backend, its plan is gone, or keys are missing.
        """
        if not isinstance(metadata, FlashInferMetadata):
            raise AttentionInputError(f"a batch planned for FLASHINFER is needed, not {type(metadata).__name__}")
        if key is not None and value is not None and kv_cache is not None:
            PagedAttention.write_to_paged_cache(key, value, kv_cache, metadata.common.slot_mapping, self.kv_scales)
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if metadata.plan is not None:
            into = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
            metadata.plan.run(Tensors(query, key, value, kv_cache, into, self.sinks, self.kv_scales))
            if into is not output:
                output.copy_(into)
        return output


class FlashInferBackend(AttentionBackend):
    """FlashInfer's prefill, decode and cascade kernels, and XQA."""

    name = "FLASHINFER"
    impl_class = FlashInferImpl
    metadata_class = FlashInferMetadata
    builder_class = FlashInferMetadataBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(8, 0), packages=("flashinfer",), ran_on=(HOPPER,)),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(64, 128, 256)),
        features=frozenset(Feature),
        attention_types=tuple(AttentionType),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """ALiBi with other slopes, soft caps, sinks or masks; windows that look ahead."""
        return refuse_combinations(needs)
