"""A batch in two parts: sequences that bring one token (decode), and those that bring more (prefill).

For backends whose libraries have one kernel for each: attention over contiguous keys, and paged decode. Split once per
batch, by the builder; no method here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from attention.kv_cache import key_rows, take_rows, token_rows
from attention.metadata import CommonAttentionMetadata, cumulative_lens


@dataclass(frozen=True)
class PrefillPart:
    """Sequences that bring several tokens.

    Attributes:
        query_lens: tokens that each brings.
        context_lens: tokens that each has.
        tokens: (Tp,) int64, their rows in T; None: all of T, in order.
        cu_seqlens_q: (P + 1,) int32, where each sequence's queries begin in Tp.
        cu_seqlens_k: (P + 1,) int32, where each sequence's keys begin in Sp.
        slots: (Sp,) int64, cache slots of their tokens, sequence after sequence.
        whole: whether every one brings all of its tokens, so that Sp is Tp and nothing must be read from the cache.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    tokens: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    slots: torch.Tensor
    whole: bool


@dataclass(frozen=True)
class DecodePart:
    """Sequences that bring one token.

    Attributes:
        context_lens: tokens that each has.
        tokens: (B1,) int64, their rows in T; None: all of T, in order.
        seq_lens: (B1,) int32, `context_lens` on the device.
        block_tables: (B1, max_blocks) int32.
    """

    context_lens: tuple[int, ...]
    tokens: torch.Tensor | None
    seq_lens: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True)
class BatchSplit:
    """Both parts; None: there is no such sequence."""

    prefill: PrefillPart | None
    decode: DecodePart | None


def split_batch(common: CommonAttentionMetadata, block_size: int) -> BatchSplit:
    """Split a batch of a decoder."""
    query_lens = np.asarray(common.query_lens, dtype=np.int64)
    single = query_lens == 1
    first = np.concatenate(([0], np.cumsum(query_lens)))[:-1]
    several, ones = np.flatnonzero(~single), np.flatnonzero(single)
    prefill = _prefill(common, several, first, block_size) if len(several) else None
    decode = _decode(common, ones, first) if len(ones) else None
    return BatchSplit(prefill, decode)


def take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """These rows of a tensor, the tensor itself for None."""
    return tensor if rows is None else tensor.index_select(0, rows)


def put(output: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> None:
    """Write `values` to these rows of `output`, to all of them for None."""
    if rows is None:
        output.copy_(values)
    else:
        output.index_copy_(0, rows, values.to(output.dtype))


def token_slots(common: CommonAttentionMetadata, block_size: int) -> torch.Tensor:
    """Where the batch's own tokens lie in the cache, by their block tables: (T,) int64, found on the device."""
    device, lens = common.seq_lens.device, common.cu_seqlens_q.diff()
    owners = torch.repeat_interleave(
        torch.arange(common.num_seqs, device=device), lens.long(), output_size=sum(common.query_lens)
    )
    ends = common.cu_seqlens_q[1:].long()[owners]
    positions = torch.arange(len(owners), device=device) - ends + common.seq_lens.long()[owners]
    blocks = common.block_tables[owners, positions // block_size].long()
    return blocks * block_size + positions % block_size


def kv_rows(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where `gather_kv` finds keys and values; the same in all layers, so a step's are made once.

    Args:
        slots: (S,) int64.
        block_size: tokens in a block.

    Returns:
        (2 * S,) int64: the `key_rows` of the slots, then the rows of their values.
    """
    keys = key_rows(slots, block_size)
    return torch.cat((keys, keys + block_size))


def gather_kv(kv_cache: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values copied out of the cache: each (S, Hkv, D), of the cache's dtype.

    Args:
        kv_cache: one layer's.
        rows: (2 * S,) int64, see `kv_rows`.
    """
    heads, head_size = kv_cache.shape[3:]
    key, value = take_rows(token_rows(kv_cache), rows).view(2, -1, heads, head_size).unbind(0)
    return key, value


def _prefill(common: CommonAttentionMetadata, sequences: np.ndarray, first: np.ndarray, block_size: int) -> PrefillPart:
    device = common.block_tables.device
    queries = tuple(common.query_lens[i] for i in sequences)
    contexts = tuple(common.context_lens[i] for i in sequences)
    positions = torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in contexts])).to(device)
    owners = torch.from_numpy(np.repeat(sequences, contexts)).to(device)
    blocks = common.block_tables.long()[owners, positions // block_size]
    tokens = None
    if len(sequences) < common.num_seqs:
        rows = np.concatenate([np.arange(first[i], first[i] + common.query_lens[i]) for i in sequences])
        tokens = torch.from_numpy(rows).to(device)
    return PrefillPart(
        query_lens=queries,
        context_lens=contexts,
        tokens=tokens,
        cu_seqlens_q=cumulative_lens(queries, device),
        cu_seqlens_k=cumulative_lens(contexts, device),
        slots=blocks * block_size + positions % block_size,
        whole=queries == contexts,
    )


def _decode(common: CommonAttentionMetadata, sequences: np.ndarray, first: np.ndarray) -> DecodePart:
    contexts = tuple(common.context_lens[i] for i in sequences)
    if len(sequences) == common.num_seqs:
        return DecodePart(contexts, None, common.seq_lens, common.block_tables)
    device = common.block_tables.device
    chosen = torch.from_numpy(sequences).to(device)
    tokens = torch.from_numpy(first[sequences]).to(device)
    return DecodePart(contexts, tokens, common.seq_lens[chosen], common.block_tables[chosen])
