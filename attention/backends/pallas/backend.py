"""PALLAS: TPUs, through JAX's Pallas kernels as torch_xla carries them.

Two kernels of `jax.experimental.pallas.ops.tpu`: `flash_attention` for prefill and `paged_attention` for decode. On a
TPU `torch_xla.experimental.custom_kernel` calls them on XLA tensors; under `interpret_on_cpu()` the same kernels run on
CPU tensors in Pallas' TPU interpreter, which is thousands of times slower and there for tests.

What their layouts cost:
- `paged_attention` wants pages (Hkv, pages, page_size, D), keys apart from values; our blocks are (2, block_size, Hkv,
  D). The blocks in use are copied per layer and step, each sequence padded to the longest: where XLA makes one loop of
  it, one read and one write of them more, three times the memory traffic of attention alone. Slots beyond a sequence's
  end are zeroed on the way: the kernel multiplies them by a weight of 0, which does not tame a NaN.
- `flash_attention` counts positions of queries and keys from the same 0, and has as many key heads as query heads. So
  keys and values are repeated for their query heads, lengths are padded to a power of two (XLA compiles a program for
  each length: a few, not thousands), and a chunk's queries are preceded by as many rows of zeros as it has tokens in
  the cache, whose results are dropped: a chunk costs what its whole context would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812

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
from attention.backends.pallas.kernels import PallasKernels, kernels_for
from attention.capability import Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.kv_cache import reshape_and_cache
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind
from attention.spec import Feature

MIN_LENGTH = 128
"""Rows of a tile of `flash_attention`: no padded length is shorter."""
PAGES_AT_ONCE = 512
"""Tokens, in whole pages, that `paged_attention` fetches at a time."""


@dataclass(frozen=True)
class PallasMetadata(AttentionMetadata):
    """A batch as the kernels take it.

    Attributes:
        split: its two parts.
        pages_per_sequence: pages that every decoding sequence is padded to.
        pages_per_compute_block: pages that the decode kernel fetches at a time; divides `pages_per_sequence`.
    """

    split: BatchSplit
    pages_per_sequence: int
    pages_per_compute_block: int


class PallasBuilder(AttentionMetadataBuilder):
    """Splits batches and rounds the decoding sequences' pages to a power of two."""

    def build(self, common: CommonAttentionMetadata) -> PallasMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, PallasBackend.capabilities.features, PallasBackend.name)
        split = split_batch(common, self.block_size)
        longest = max(split.decode.context_lens) if split.decode is not None else 1
        pages = next_power_of_two(-(-longest // self.block_size))
        return PallasMetadata(common, split, pages, min(pages, next_power_of_two(PAGES_AT_ONCE // self.block_size)))


class PallasImpl(AttentionImpl):
    """One layer through JAX's Pallas kernels."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `metadata` is a `PallasMetadata`."""
        batch = cast(PallasMetadata, metadata)
        if kv_cache is None:
            raise AttentionInputError("PALLAS needs a KV cache")
        kernels = kernels_for(query.device)
        if key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, batch.common.slot_mapping)
        if output is None:
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.split.prefill is not None:
            self._prefill(kernels, query, kv_cache, batch.split.prefill, output)
        if batch.split.decode is not None:
            self._decode(kernels, query, kv_cache, batch, batch.split.decode, output)
        return output

    def _prefill(
        self,
        kernels: PallasKernels,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        part: PrefillPart,
        output: torch.Tensor,
    ) -> None:
        keys, values = gather_kv(kv_cache, kv_rows(part.slots, kv_cache.shape[2]))
        group = self.spec.num_heads // self.spec.num_kv_heads
        attended = []
        queries = take(query, part.tokens).split(list(part.query_lens))
        contexts = list(part.context_lens)
        for q, k, v in zip(queries, keys.split(contexts), values.split(contexts), strict=True):
            prefix, context = k.shape[0] - q.shape[0], k.shape[0]
            padding = max(MIN_LENGTH, next_power_of_two(context)) - context
            result = kernels.flash(
                F.pad(q, (0, 0, 0, 0, prefix, padding)).transpose(0, 1)[None],
                F.pad(k, (0, 0, 0, 0, 0, padding)).repeat_interleave(group, dim=1).transpose(0, 1)[None],
                F.pad(v, (0, 0, 0, 0, 0, padding)).repeat_interleave(group, dim=1).transpose(0, 1)[None],
                self.spec.scale,
            )
            attended.append(result[0, :, prefix:context].transpose(0, 1))
        put(output, part.tokens, torch.cat(attended))

    def _decode(
        self,
        kernels: PallasKernels,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PallasMetadata,
        part: DecodePart,
        output: torch.Tensor,
    ) -> None:
        key_pages, value_pages = pages(kv_cache, part, batch.pages_per_sequence)
        indices = torch.arange(key_pages.shape[1], dtype=torch.int32, device=query.device)
        attended = kernels.paged(
            (take(query, part.tokens).float() * self.spec.scale).to(query.dtype),
            key_pages,
            value_pages,
            part.seq_lens,
            indices.view(len(part.context_lens), batch.pages_per_sequence),
            batch.pages_per_compute_block,
        )
        put(output, part.tokens, attended)


class PallasBackend(AttentionBackend):
    """TPUs. CPU tensors are refused outside `interpret_on_cpu()`, and a CPU is no platform of this backend."""

    name = "PALLAS"
    impl_class = PallasImpl
    metadata_class = PallasMetadata
    builder_class = PallasBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.TPU, packages=("jax", "torch_xla")),),
        dtypes=(torch.bfloat16,),  # the decode kernel rounds keys and values to bf16 whatever they are
        head_sizes=Sizes(128, 256, 128),
        block_sizes=Sizes(only=(16, 32, 64, 128, 256)),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={
            Feature.SOFT_CAP: "the prefill kernel has no soft cap",
            Feature.SLIDING_WINDOW: "neither kernel has a sliding window",
            Feature.FP8_KV: "the decode kernel takes int8 and FP8 pages with a scale for each token only",
        },
    )


def pages(kv_cache: torch.Tensor, part: DecodePart, pages_per_sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks of decoding sequences into the kernel's layout, zero beyond each sequence's end.

    Args:
        kv_cache: (num_blocks, 2, block_size, Hkv, D).
        part: the sequences, B of them.
        pages_per_sequence: P, at least the blocks of the longest.

    Returns:
        Keys and values, (Hkv, B * P, block_size, D) each.
    """
    block_size = kv_cache.shape[2]
    tables = part.block_tables[:, :pages_per_sequence]
    tables = F.pad(tables, (0, pages_per_sequence - tables.shape[1])).flatten()
    positions = torch.arange(pages_per_sequence * block_size, device=kv_cache.device)
    unused = (positions >= part.seq_lens[:, None]).view(-1, 1, block_size, 1, 1)
    blocks = kv_cache.index_select(0, tables).masked_fill_(unused, 0)
    key_pages, value_pages = blocks.permute(1, 3, 0, 2, 4).contiguous().unbind(0)
    return key_pages, value_pages


def next_power_of_two(n: int) -> int:
    """The least power of two that is not less than `n`, at least 1."""
    return 1 << max(0, n - 1).bit_length()
