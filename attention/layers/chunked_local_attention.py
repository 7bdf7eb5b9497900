"""Chunked local attention (Llama 4): a token sees the tokens of its own chunk of the context only, up to itself.

No kernel knows of it. The batch is rewritten: every chunk that a sequence's queries lie in becomes a sequence of
its own, which begins with the chunk. Blocks do not straddle chunks, so its block table is a cut of the sequence's.
Queries keep their order, and with it the slots where new keys and values are stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
import torch

from attention.backend import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder, KVScales
from attention.errors import AttentionInputError
from attention.layers.attention import Attention
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec, AttentionType


class ChunkedLocalAttention(Attention):
    """Attention to the earlier tokens of the same chunk.

    Its `backend` is `chunked_local_backend` of the one that is given: batches must be planned by that one's builder.

    Args:
        spec: the layer, of a decoder.
        backend: how chunks attend.
        name: see `Attention`.
        chunk_size: tokens in a chunk; a multiple of the block size.
        sinks: see `Attention`.
        kv_scales: see `Attention`.

    Raises:
        AttentionInputError: the layer is not a decoder's, or the chunk size is not positive.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: type[AttentionBackend],
        name: str,
        chunk_size: int,
        sinks: torch.Tensor | None = None,
        kv_scales: KVScales | None = None,
    ) -> None:
        if spec.attn_type is not AttentionType.DECODER:
            raise AttentionInputError(f"chunked local attention is for decoders, not for {spec.attn_type}")
        super().__init__(spec, chunked_local_backend(backend, chunk_size), name, sinks, kv_scales)
        self.chunk_size = chunk_size


class ChunkedLocalBuilder(AttentionMetadataBuilder):
    """Rewrites batches for the builder of another backend; subclasses say which.

    Args:
        spec: the layers.
        dtype: of queries.
        block_size: tokens in a KV block.
        device: where the batches are.

    Raises:
        AttentionInputError: a block would straddle chunks.
    """

    inner_class: ClassVar[type[AttentionMetadataBuilder]]
    chunk_size: ClassVar[int]

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        if self.chunk_size % block_size:
            raise AttentionInputError(f"chunks of {self.chunk_size} tokens are not whole blocks of {block_size}")
        self._inner = self.inner_class(spec, dtype, block_size, device)

    def build(self, common: CommonAttentionMetadata) -> AttentionMetadata:
        """What the inner builder makes of the rewritten batch.

        Raises:
            AttentionInputError: the batch brings a mask.
        """
        return self._inner.build(split_into_chunks(common, self.chunk_size, self.block_size))


@functools.cache
def chunked_local_backend(backend: type[AttentionBackend], chunk_size: int) -> type[AttentionBackend]:
    """The backend with a builder that rewrites batches.

    Raises:
        AttentionInputError: the chunk size is not positive.
    """
    if chunk_size < 1:
        raise AttentionInputError(f"a chunk holds at least 1 token, not {chunk_size}")
    fields = {"inner_class": backend.builder_class, "chunk_size": chunk_size}
    builder = type(f"ChunkedLocal{backend.builder_class.__name__}", (ChunkedLocalBuilder,), fields)
    chunked = type(f"ChunkedLocal{backend.__name__}", (backend,), {"builder_class": builder})
    return cast(type[AttentionBackend], chunked)


def split_into_chunks(common: CommonAttentionMetadata, chunk_size: int, block_size: int) -> CommonAttentionMetadata:
    """The same queries as a batch with one sequence for each chunk that they lie in.

    Args:
        common: the batch.
        chunk_size: tokens in a chunk, a multiple of `block_size`.
        block_size: tokens in a KV block.

    Raises:
        AttentionInputError: the batch brings a mask, whose rows would be of other keys.
    """
    if common.features:
        raise AttentionInputError(f"a {', '.join(common.features)} does not go with chunked local attention")
    owners: list[int] = []
    chunks: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    for i, (queries, context) in enumerate(zip(common.query_lens, common.context_lens, strict=True)):
        first = context - queries
        for chunk in range(first // chunk_size, -(-context // chunk_size)):
            begin, end = chunk * chunk_size, min((chunk + 1) * chunk_size, context)
            owners.append(i)
            chunks.append(chunk)
            query_lens.append(end - max(begin, first))
            context_lens.append(end - begin)
    device = common.block_tables.device
    offsets = np.zeros(len(query_lens) + 1, dtype=np.int32)
    np.cumsum(query_lens, out=offsets[1:])
    return CommonAttentionMetadata(
        cu_seqlens_q=torch.from_numpy(offsets).to(device),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=_cut_tables(
            common.block_tables, owners, chunks, context_lens, chunk_size // block_size, block_size
        ),
        slot_mapping=common.slot_mapping,
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
    )


def _cut_tables(
    tables: torch.Tensor,
    owners: Sequence[int],
    chunks: Sequence[int],
    context_lens: Sequence[int],
    blocks_per_chunk: int,
    block_size: int,
) -> torch.Tensor:
    """(chunks, blocks) int32: each chunk's part of its owner's row, padded with 0."""
    used = -(-np.asarray(context_lens, dtype=np.int64) // block_size)
    columns = np.arange(max(used, default=0))
    inside = columns < used[:, None]
    wanted = np.where(inside, np.asarray(chunks, dtype=np.int64)[:, None] * blocks_per_chunk + columns, 0)
    device = tables.device
    rows = torch.tensor(owners, dtype=torch.int64, device=device)[:, None]
    cut = tables[rows, torch.from_numpy(wanted).to(device)]
    return cut.masked_fill_(torch.from_numpy(~inside).to(device), 0)
