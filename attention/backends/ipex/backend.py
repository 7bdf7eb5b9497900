"""IPEX: Intel GPUs, through Intel Extension for PyTorch (https://github.com/intel/intel-extension-for-pytorch).

One kernel, `ipex.llm.modules.PagedAttention.flash_attn_varlen_func` of the XPU builds (2.7 and later), does prefill,
prefix and decode over the paged cache. It wants keys and values as two contiguous caches (blocks, block_size, Hkv, D).
Ours has a block's keys before its values: seen as twice as many blocks, block b's keys are block 2b, and its values are
block 2b of the same memory one block later. So nothing is copied; block tables are doubled once per batch.

The extension's CPU build has another cache layout, and its last release (2.8) refuses newer PyTorch: not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.backends.common.libraries import load_library
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.kv_cache import reshape_and_cache
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind
from attention.spec import AttentionSpec, Feature


@dataclass(frozen=True)
class IpexMetadata(AttentionMetadata):
    """A batch as the kernel takes it.

    Attributes:
        cu_seqlens_k: (B + 1,) int32, sums of the context lengths.
        doubled_tables: (B, max_blocks) int32, where the blocks' keys are in the cache seen as single blocks.
    """

    cu_seqlens_k: torch.Tensor
    doubled_tables: torch.Tensor


class IpexBuilder(AttentionMetadataBuilder):
    """Doubles the block tables and sums the context lengths, on the device."""

    def build(self, common: CommonAttentionMetadata) -> IpexMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, IpexBackend.capabilities.features, IpexBackend.name)
        sums = torch.zeros(common.num_seqs + 1, dtype=torch.int32, device=common.seq_lens.device)
        torch.cumsum(common.seq_lens, 0, dtype=torch.int32, out=sums[1:])
        return IpexMetadata(common, sums, common.block_tables * 2)


class IpexImpl(AttentionImpl):
    """One layer through Intel Extension for PyTorch.

    Raises:
        AttentionBackendError: the extension is missing.
    """

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        super().__init__(spec, sinks)
        ipex = load_library("intel_extension_for_pytorch", IpexBackend.name)
        self._paged_attention: Any = ipex.llm.modules.PagedAttention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `metadata` is an `IpexMetadata`."""
        batch = cast(IpexMetadata, metadata)
        if kv_cache is None:
            raise AttentionInputError("IPEX needs a KV cache")
        if key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, batch.common.slot_mapping)
        packed = output
        if packed is None or not packed.is_contiguous():
            packed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.common.num_seqs == 0:
            return packed if output is None else output
        key_blocks, value_blocks = single_blocks(kv_cache)
        window = self.spec.sliding_window
        self._paged_attention.flash_attn_varlen_func(
            packed,
            query.contiguous(),
            key_blocks,
            value_blocks,
            batch.common.cu_seqlens_q,
            batch.cu_seqlens_k,
            batch.common.max_query_len,
            batch.common.max_seq_len,
            self.spec.scale,
            True,
            batch.doubled_tables,
            alibi_slopes=None,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=-1 if window is None else 0,
            softcap=-1.0 if self.spec.logits_soft_cap is None else self.spec.logits_soft_cap,
        )
        if output is None or packed is output:
            return packed
        return output.copy_(packed)


class IpexBackend(AttentionBackend):
    """Intel GPUs. The sizes are those that the extension's own tests run."""

    name = "IPEX"
    impl_class = IpexImpl
    metadata_class = IpexMetadata
    builder_class = IpexBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.XPU, packages=("intel_extension_for_pytorch",)),),
        dtypes=HALVES,
        head_sizes=Sizes(64, 256, 64),
        block_sizes=Sizes(only=(16, 32, 64, 128)),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.SLIDING_WINDOW, Feature.SOFT_CAP}),
        refused={
            Feature.FP8_KV: "the extension converts an FP8 cache as a whole at every call",
            Feature.ALIBI: "the extension's paged kernel is not tested with ALiBi",
        },
    )


def single_blocks(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two contiguous views of one layer's cache in which block 2b is block b's keys, and block b's values.

    Args:
        kv_cache: (num_blocks, 2, block_size, Hkv, D).

    Returns:
        (2 * num_blocks, block_size, Hkv, D) for keys, and one block less for values.
    """
    blocks = kv_cache.flatten(0, 1)
    return blocks, blocks[1:]
