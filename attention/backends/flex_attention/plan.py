"""How a packed, paged batch becomes calls of `flex_attention`: planned once, used by every layer.

What a query sees of its sequence is one interval of keys, whatever the causal rule and the window say; a tree or custom
mask chooses among them. The keys of a group of sequences are laid one after the other in one buffer, so a query's
interval is two numbers, and the mask function is two loads and two comparisons for every feature alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from attention.kv_cache import key_rows
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec

TILE = 128
"""Queries and keys of a tile of the block mask."""

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ScoreMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FlexGroup:
    """Sequences that attend in one call, their keys in one buffer.

    Attributes:
        q_begin: their first row in T.
        q_end: one past their last row in T.
        batched: whether each brings one query and they are the batch dimension; else the queries are one long row.
        rows: (S,) int64, rows of the keys in the cache; None: the keys are this batch's own, from `q_begin` to `q_end`.
        block_mask: which tiles of keys each tile of queries sees.
        score_mod: soft cap and ALiBi; None without.
    """

    q_begin: int
    q_end: int
    batched: bool
    rows: torch.Tensor | None
    block_mask: BlockMask
    score_mod: ScoreMod | None


@dataclass(frozen=True)
class Intervals:
    """What each of a group's n queries sees, in positions of the group's key buffer.

    Attributes:
        begin: (n,) first key.
        end: (n,) one past the last key.
        position: (n,) of the query itself, where distances are counted from.
        listed_from: (n,) from this key on a mask has the say; None: there is no mask.
        listed_at: (n,) where the mask's entry of buffer position 0 would be.
    """

    begin: np.ndarray
    end: np.ndarray
    position: np.ndarray
    listed_from: np.ndarray | None
    listed_at: np.ndarray | None


def plan_groups(
    spec: AttentionSpec,
    common: CommonAttentionMetadata,
    block_size: int,
    max_tokens: int,
    slopes: torch.Tensor | None,
) -> tuple[FlexGroup, ...]:
    """Plan a batch: sequences in order, in groups of at most `max_tokens` gathered keys (or of one sequence)."""
    cached = spec.attn_type.cached
    first_keys = _first_keys(spec, common)
    kept = [context - first for context, first in zip(common.context_lens, first_keys, strict=True)]
    mask = common.custom_mask if common.custom_mask is not None else common.tree_mask
    mask = None if mask is None else mask.to(common.seq_lens.device).flatten()
    groups = []
    q_begin = mask_begin = 0
    for sequences in _split(kept, max_tokens if cached else sum(kept)):
        q_end = q_begin + sum(common.query_lens[i] for i in sequences)
        intervals, mask_begin = _intervals(spec, common, sequences, first_keys, mask_begin)
        num_keys = sum(kept[i] for i in sequences)
        if num_keys:
            rows = _rows(common, sequences, first_keys, kept, block_size) if cached else None
            batched = all(common.query_lens[i] == 1 for i in sequences)
            groups.append(_group(spec, intervals, (q_begin, q_end), num_keys, batched, rows, mask, slopes, common))
        q_begin = q_end
    return tuple(groups)


def _first_keys(spec: AttentionSpec, common: CommonAttentionMetadata) -> list[int]:
    """The first key of each sequence that any of its queries sees."""
    if spec.sliding_window is None or common.custom_mask is not None:
        return [0] * common.num_seqs
    return [
        max(0, context - query - spec.sliding_window + 1)
        for query, context in zip(common.query_lens, common.context_lens, strict=True)
    ]


def _split(sizes: Sequence[int], limit: int) -> list[range]:
    """Cut a list where the sum of a part would be more than the limit."""
    parts, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            parts.append(range(begin, i))
            begin, total = i, 0
        total += size
    return [*parts, range(begin, len(sizes))] if sizes else []


def _intervals(
    spec: AttentionSpec,
    common: CommonAttentionMetadata,
    sequences: range,
    first_keys: Sequence[int],
    mask_begin: int,
) -> tuple[Intervals, int]:
    """What a group's queries see, and where the next group's part of a custom mask begins."""
    begins, ends, positions, listed_from, listed_at = [], [], [], [], []
    buffer_begin = 0
    custom, tree = common.custom_mask is not None, common.tree_mask is not None
    causal = spec.causal and not custom and not tree
    for i in sequences:
        query, context = common.query_lens[i], common.context_lens[i]
        zero = buffer_begin - first_keys[i]  # where the sequence's key 0 is, or would be
        row = np.arange(query, dtype=np.int64)
        position = zero + context - query + row
        begin = np.full(query, buffer_begin, dtype=np.int64)
        end = np.full(query, zero + context, dtype=np.int64)
        tree_begin = zero + context - query
        if causal:
            end = np.minimum(end, position + 1)
        if spec.sliding_window is not None and not custom:
            begin = np.maximum(begin, position - spec.sliding_window + 1)
            if tree:  # the window bounds the context, never the tree
                begin = np.minimum(begin, tree_begin)
            elif not causal:
                end = np.minimum(end, position + spec.sliding_window)
        if custom:
            listed_from.append(begin)
            listed_at.append(mask_begin + row * context - zero)
            mask_begin += query * context
        elif tree:
            listed_from.append(np.full(query, tree_begin, dtype=np.int64))
            listed_at.append(row * query - tree_begin)
        begins.append(begin)
        ends.append(end)
        positions.append(position)
        buffer_begin = zero + context
    masked = custom or tree
    intervals = Intervals(
        begin=np.concatenate(begins),
        end=np.concatenate(ends),
        position=np.concatenate(positions),
        listed_from=np.concatenate(listed_from) if masked else None,
        listed_at=np.concatenate(listed_at) if masked else None,
    )
    return intervals, mask_begin


def _rows(
    common: CommonAttentionMetadata,
    sequences: range,
    first_keys: Sequence[int],
    kept: Sequence[int],
    block_size: int,
) -> torch.Tensor:
    """(S,) int64, rows of the group's keys in the cache, see `key_rows`."""
    device = common.block_tables.device
    position = np.concatenate([np.arange(first_keys[i], first_keys[i] + kept[i], dtype=np.int64) for i in sequences])
    owner = np.repeat(np.arange(sequences.start, sequences.stop, dtype=np.int64), [kept[i] for i in sequences])
    positions, owners = torch.from_numpy(position).to(device), torch.from_numpy(owner).to(device)
    blocks = common.block_tables[owners, positions // block_size].long()
    return key_rows(blocks * block_size + positions % block_size, block_size)


def _group(
    spec: AttentionSpec,
    intervals: Intervals,
    queries: tuple[int, int],
    num_keys: int,
    batched: bool,
    rows: torch.Tensor | None,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    common: CommonAttentionMetadata,
) -> FlexGroup:
    device = common.seq_lens.device

    def moved(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    begin, end, position = moved(intervals.begin), moved(intervals.end), moved(intervals.position)
    if mask is None or intervals.listed_from is None or intervals.listed_at is None:
        mask_mod = _interval_mod(begin, end)
    else:
        at = torch.from_numpy(intervals.listed_at).to(device)
        mask_mod = _listed_mod(begin, end, moved(intervals.listed_from), at, mask)
    return FlexGroup(
        *queries,
        batched=batched,
        rows=rows,
        block_mask=_block_mask(intervals, num_keys, batched, mask_mod, device),
        score_mod=_score_mod(spec.logits_soft_cap, slopes, position),
    )


def _block_mask(
    intervals: Intervals, num_keys: int, batched: bool, mask_mod: MaskMod, device: torch.device
) -> BlockMask:
    """The tiles of keys that each tile of queries sees: from `first` to `last`, wholly from `whole` to `masked`.

    A tile of queries of several sequences visits what lies between their intervals, too; the mask function hides it.
    There are always two tiles of queries in a row, if only for a second that is never looked at: for the compiler, a
    dimension of 1 would be another kernel.
    """
    num_queries = len(intervals.begin)
    starts = np.arange(num_queries) if batched else np.arange(0, num_queries, TILE)
    seen = intervals.end > intervals.begin
    first = np.minimum.reduceat(np.where(seen, intervals.begin, num_keys), starts) // TILE
    last = -(-np.maximum.reduceat(np.where(seen, intervals.end, 0), starts) // TILE)
    sure = intervals.end if intervals.listed_from is None else np.minimum(intervals.end, intervals.listed_from)
    whole = np.clip(-(-np.maximum.reduceat(intervals.begin, starts) // TILE), first, None)
    masked = np.clip(np.minimum.reduceat(sure, starts) // TILE, whole, None)
    last = np.maximum(last, first)
    masked = np.minimum(masked, last)
    whole = np.minimum(whole, masked)
    if len(starts) == 1 and not batched:
        first, last, whole, masked = (np.repeat(edge, 2) for edge in (first, last, whole, masked))
    shape = (num_queries, 1, 1) if batched else (1, 1, len(first))
    column = np.arange(int((last - first).max()) + 1)
    partial = first[:, None] + column
    partial = np.where(partial < whole[:, None], partial, partial + (masked - whole)[:, None])
    counts = [(last - first) - (masked - whole), masked - whole]
    indices = [partial, whole[:, None] + column]
    limit = -(-num_keys // TILE) - 1
    num_partial, num_whole = (torch.from_numpy(n.astype(np.int32)).to(device).view(shape) for n in counts)
    partials, wholes = (
        torch.from_numpy(np.minimum(index, limit).astype(np.int32)).to(device).view(*shape, -1) for index in indices
    )
    return BlockMask.from_kv_blocks(
        num_partial,
        partials,
        num_whole,
        wholes,
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(1 if batched else num_queries, num_keys),
        compute_q_blocks=False,  # only a backward pass needs them
    )


# One of `batch` and `query` is always 0, see `FlexGroup.batched`: their sum is the query's index in the group.


def _interval_mod(begin: torch.Tensor, end: torch.Tensor) -> MaskMod:
    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        index = batch + query
        return (key >= begin[index]) & (key < end[index])

    return mask_mod


def _listed_mod(
    begin: torch.Tensor, end: torch.Tensor, listed_from: torch.Tensor, listed_at: torch.Tensor, mask: torch.Tensor
) -> MaskMod:
    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        index = batch + query
        inside = (key >= begin[index]) & (key < end[index])
        listed = inside & (key >= listed_from[index])
        entry = torch.where(listed, listed_at[index] + key, 0)
        return inside & (~listed | mask[entry])

    return mask_mod


def _score_mod(soft_cap: float | None, slopes: torch.Tensor | None, position: torch.Tensor) -> ScoreMod | None:
    if soft_cap is None and slopes is None:
        return None

    def score_mod(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        if slopes is not None:
            score = score - slopes[head] * torch.abs(position[batch + query] - key)
        return score

    return score_mod
