"""FLASH_ATTN: varlen FlashAttention, from whichever package brings the best one; PyTorch itself brings one.

Keys and values are read where they are: this batch's own when no sequence has others, else the paged cache. Where the
package cannot read the cache (PyTorch's operator in some versions, FP8, block sizes), or reads so many queries' keys
faster in one piece, they are gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    refuse_masks,
)
from attention.backends.common.batch_split import gather_kv, kv_rows, token_slots
from attention.backends.flash_attn.calls import Call
from attention.backends.flash_attn.gathering import should_gather
from attention.backends.flash_attn.trial import compile_kernels
from attention.backends.flash_attn.versions import (
    FlashAttnVersion,
    Provider,
    choose_provider,
    force_flash_attn_version,
    refuse_providers,
)
from attention.capability import HALVES, HOPPER, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.ops.paged_attention import PagedAttention
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType, Feature, Phase

__all__ = ["FlashAttnBackend", "FlashAttnImpl", "FlashAttnMetadata", "FlashAttnVersion", "force_flash_attn_version"]

_NO_MASKS = "FlashAttention's kernels take no mask"


@dataclass(frozen=True)
class FlashAttnMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        provider: whose kernel runs.
        fresh: whether every sequence brings all of its tokens, so that nothing is read from a cache.
        cu_seqlens_k: (B + 1,) int32, where each sequence's keys begin.
        rows: (2 * sum of seq_lens,) int64, where all keys and values lie, see `kv_rows`; None: nothing is gathered.
        page_size: tokens in a page, as the kernel is told.
        page_tables: (B, max_pages) int32, pages of each sequence, see `paged_views`; None: it reads no cache.
    """

    provider: Provider
    fresh: bool
    cu_seqlens_k: torch.Tensor
    rows: torch.Tensor | None = None
    page_size: int = 0
    page_tables: torch.Tensor | None = None


class FlashAttnMetadataBuilder(AttentionMetadataBuilder):
    """Plans batches: where keys and values are read, by whose kernel."""

    graph_safe_prefill = True

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        platform = Platform.of(device)
        self.provider = choose_provider(platform, spec)
        self._for_decode = choose_provider(platform, spec, decode=True)
        if self.provider.compiles and device.type == "cuda":
            page_size = self._page_size(self.provider)
            page = None if page_size is None else (page_size, block_size)
            compile_kernels(self.provider.kernel, spec, dtype, page, device)

    def build(self, common: CommonAttentionMetadata) -> FlashAttnMetadata:
        """See `AttentionMetadataBuilder.build`; never waits for the device."""
        refuse_masks(common, FlashAttnBackend.capabilities.features, FlashAttnBackend.name)
        provider = self._for_decode if common.decode_only else self.provider
        fp8 = self.spec.fp8_cache
        decoder = self.spec.attn_type is AttentionType.DECODER
        fresh = not self.spec.attn_type.cached or (decoder and not fp8 and common.query_lens == common.context_lens)
        if fresh:
            return FlashAttnMetadata(common, provider, True, common.cu_seqlens_q)
        cu_seqlens_k = torch.zeros_like(common.cu_seqlens_q)
        torch.cumsum(common.seq_lens, 0, out=cu_seqlens_k[1:])
        page_size = self._page_size(provider)
        if page_size is None or should_gather(provider.gather_from, common, self.spec, self.dtype):
            rows = kv_rows(key_slots(common, cu_seqlens_k, self.block_size), self.block_size)
            return FlashAttnMetadata(common, provider, False, cu_seqlens_k, rows)
        tables = page_tables(common.block_tables, self.block_size // page_size)
        return FlashAttnMetadata(common, provider, False, cu_seqlens_k, None, page_size, tables)

    def _page_size(self, provider: Provider) -> int | None:
        """What a provider is told; None: keys are gathered, as it cannot read the cache."""
        return None if self.spec.fp8_cache else provider.page_size(self.block_size, self.spec.head_size)


class FlashAttnImpl(AttentionImpl):
    """One layer's attention."""

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        super().__init__(spec, sinks)
        self._slopes: torch.Tensor | None = None
        reach = -1 if spec.sliding_window is None else spec.sliding_window - 1
        self._window = (reach, 0 if spec.causal and reach >= 0 else reach)

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
        if not isinstance(metadata, FlashAttnMetadata):
            raise AttentionInputError(f"a batch planned for FLASH_ATTN is needed, not {type(metadata).__name__}")
        common = metadata.common
        if key is not None and value is not None and kv_cache is not None:
            PagedAttention.write_to_paged_cache(key, value, kv_cache, common.slot_mapping, self.kv_scales)
        output = torch.empty_like(query, memory_format=torch.contiguous_format) if output is None else output
        if query.shape[0] == 0:
            return output
        keys, values = self._keys(query, key, value, kv_cache, metadata)
        fp8 = self.spec.fp8_cache
        native_sinks = Feature.SINKS in metadata.provider.native
        call = Call(
            query=query,
            key=keys,
            value=values,
            output=output,
            cu_seqlens_q=common.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_tables=metadata.page_tables,
            scale=self.spec.scale * self.kv_scales.k if fp8 else self.spec.scale,
            causal=self.spec.causal,
            window=self._window,
            soft_cap=self.spec.logits_soft_cap or 0.0,
            alibi_slopes=self._alibi(query.device),
            sinks=self.sinks if native_sinks else None,
            wants_lse=self.sinks is not None and not native_sinks,
        )
        lse = metadata.provider.kernel(call)
        if lse is not None and self.sinks is not None:
            output.mul_(torch.sigmoid(lse.T - self.sinks).unsqueeze(-1))
        return output.mul_(self.kv_scales.v) if fp8 else output

    def _keys(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: FlashAttnMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values to read: packed, or pages. FP8 ones are not scaled yet, which costs nothing elsewhere."""
        if metadata.fresh and key is not None and value is not None:
            return key, value
        if kv_cache is None:
            raise AttentionInputError("keys and values are neither given nor in a cache")
        if metadata.page_tables is not None:
            return paged_views(kv_cache, metadata.page_size)
        rows, block_size = metadata.rows, kv_cache.shape[2]
        if rows is None:
            rows = kv_rows(token_slots(metadata.common, block_size), block_size)
        keys, values = gather_kv(kv_cache, rows)
        return keys.to(query.dtype), values.to(query.dtype)

    def _alibi(self, device: torch.device) -> torch.Tensor | None:
        if self.spec.alibi_slopes is not None and self._slopes is None:
            self._slopes = torch.tensor(self.spec.alibi_slopes, dtype=torch.float32, device=device)
        return self._slopes


class FlashAttnBackend(AttentionBackend):
    """Varlen FlashAttention 2, 3 or 4."""

    name = "FLASH_ATTN"
    impl_class = FlashAttnImpl
    metadata_class = FlashAttnMetadata
    builder_class = FlashAttnMetadataBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(8, 0), ran_on=(HOPPER,)),),
        dtypes=HALVES,
        head_sizes=Sizes(8, 256, 8),
        features=frozenset(Feature) - {Feature.TREE_MASK, Feature.CUSTOM_MASK, Feature.CASCADE},
        refused={
            Feature.TREE_MASK: _NO_MASKS,
            Feature.CUSTOM_MASK: _NO_MASKS,
            Feature.CASCADE: "FlashAttention attends to every sequence on its own",
        },
        attention_types=tuple(AttentionType),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """No package brings what is asked: a version that is forced, a soft cap, ALiBi."""
        if platform.kind is not DeviceKind.CUDA:
            return []
        return refuse_providers(platform, needs.spec)

    @classmethod
    def generation(cls, platform: Platform, needs: AttentionNeeds) -> int | None:
        """Of FlashAttention."""
        if cls.refuse(platform, needs):
            return None
        return int(choose_provider(platform, needs.spec, decode=needs.phase is Phase.DECODE).version)


def key_slots(common: CommonAttentionMetadata, cu_seqlens_k: torch.Tensor, block_size: int) -> torch.Tensor:
    """Cache slots of all keys of all sequences, in order: (sum of seq_lens,) int64, found on the device."""
    total = sum(common.context_lens)
    device = common.seq_lens.device
    owners = torch.repeat_interleave(
        torch.arange(common.num_seqs, device=device), common.seq_lens.long(), output_size=total
    )
    positions = torch.arange(total, device=device) - cu_seqlens_k.long()[owners]
    blocks = common.block_tables[owners, positions // block_size].long()
    return blocks * block_size + positions % block_size


def page_tables(block_tables: torch.Tensor, pages: int) -> torch.Tensor:
    """Block tables in pages that divide a block's keys, numbered through a layer's cache as `paged_views` cuts it.

    Args:
        block_tables: (B, max_blocks) int32.
        pages: how many make up the keys of a block.

    Returns:
        (B, max_blocks * pages) int32; the given ones where a page is a block.
    """
    if pages == 1:
        return block_tables
    first = block_tables.unsqueeze(-1) * (2 * pages)
    parts = torch.arange(pages, dtype=torch.int32, device=block_tables.device)
    return (first + parts).flatten(1)


def paged_views(kv_cache: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values as pages, (pages, page_size, Hkv, D), with the same number for both: views.

    Cut smaller than a block, keys and values are one row of pages, the values that many pages behind their keys.
    """
    _, _, block_size, heads, head_size = kv_cache.shape
    if page_size == block_size:
        return kv_cache[:, 0], kv_cache[:, 1]
    row, behind = kv_cache.view(-1, page_size, heads, head_size), block_size // page_size
    return row[:-behind], row[behind:]
