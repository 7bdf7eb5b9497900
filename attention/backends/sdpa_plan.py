"""How a packed, paged batch becomes calls of `scaled_dot_product_attention`: planned once, used by every layer.

Keys and values are gathered token by token, never block by block: the unused slots of a last block may hold anything,
and a weight of zero does not tame a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention.backend import AttentionMetadata, AttentionSpec
from attention.kv_cache import key_rows

TILE = 256
"""Query rows per call where a mask is needed: bounds the mask, and the keys a tile cannot see are left out."""


@dataclass(frozen=True)
class Tile:
    """Query rows of one sequence that attend together.

    Attributes:
        q_begin: first row in T.
        q_end: one past the last row in T.
        k_begin: first visible key, counted in the sequence's keys.
        k_end: one past the last visible key.
        mask: (q_end - q_begin, k_end - k_begin) float32, added to the scores; None: causal and square.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class PrefillSequence:
    """A sequence that brings several tokens.

    Attributes:
        rows: (2 * S,) int64, rows of its keys, then of its values, in the cache; None: all of them are this
            batch's own tokens `q_begin` to `q_end`, and nothing is gathered.
    """

    q_begin: int
    q_end: int
    rows: torch.Tensor | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences that bring one token each and attend together.

    Attributes:
        size: how many sequences.
        tokens: (size,) int64, their rows in T; None: all of T, in order.
        rows: (2 * size * S,) int64, rows of their keys, then of their values, in the cache; a shorter sequence
            repeats its last token.
        mask: (size, 1, 1, S) float32, -inf on the repeated ones; None: nothing is repeated.
    """

    size: int
    tokens: torch.Tensor | None
    rows: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class SdpaPlan:
    """What all layers of one kind share for one batch. `store` is (2, T) int64, see `kv_cache.store_rows`."""

    store: torch.Tensor
    prefill: tuple[PrefillSequence, ...]
    decode: tuple[DecodeGroup, ...]


def make_plan(spec: AttentionSpec, metadata: AttentionMetadata, block_size: int, max_group_tokens: int) -> SdpaPlan:
    """Plan a batch; one-token sequences are grouped up to `max_group_tokens` keys, 0 for one at a time."""
    keys = key_rows(metadata.slot_mapping, block_size)
    tables = metadata.block_tables.long()
    longest = max((c for q, c in zip(metadata.query_lens, metadata.context_lens, strict=True) if q > 1), default=0)
    band = band_mask(TILE, longest, spec.sliding_window) if longest else None
    prefill: list[PrefillSequence] = []
    single: list[tuple[int, int, int]] = []
    begin = 0
    for i, query_len in enumerate(metadata.query_lens):
        if query_len == 1:
            seen = visible(metadata.context_lens[i], spec.sliding_window)
            single.append((seen, i, begin))
        elif band is not None:
            sequence = _plan_sequence(
                begin, query_len, metadata.context_lens[i], tables[i], block_size, spec.sliding_window, band
            )
            prefill.append(sequence)
        begin += query_len
    groups = group_by_length(single, max_group_tokens)
    whole = len(groups) == 1 and not prefill
    decode = tuple(_plan_group(group, metadata, tables, block_size, whole) for group in groups)
    return SdpaPlan(torch.stack((keys, keys + block_size)), tuple(prefill), decode)


def visible(context_len: int, sliding_window: int | None) -> int:
    """How many tokens the last of `context_len` tokens sees, itself included."""
    return context_len if sliding_window is None else min(context_len, sliding_window)


def band_mask(num_queries: int, num_keys: int, sliding_window: int | None) -> torch.Tensor:
    """(num_queries, num_keys) float32, 0 where a query sees a key and -inf elsewhere; the last query has the last key.

    Because it is aligned at its lower right corner, a smaller tile is this mask's lower right part.
    """
    behind = torch.arange(num_queries - 1, -1, -1)[:, None] - torch.arange(num_keys - 1, -1, -1)[None, :]
    hidden = behind > 0
    if sliding_window is not None:
        hidden |= behind <= -sliding_window
    return torch.zeros(num_queries, num_keys).masked_fill_(hidden, float("-inf"))


def group_by_length(single: list[tuple[int, int, int]], max_group_tokens: int) -> list[list[tuple[int, int, int]]]:
    """Put sequences of similar length together, longest first; a group is padded by at most a quarter or 32 tokens.

    Args:
        single: (visible keys, sequence, row in T) of each.
        max_group_tokens: padded keys of a group; a group has at least one sequence whatever its length.
    """
    groups: list[list[tuple[int, int, int]]] = []
    for item in sorted(single, key=lambda entry: (-entry[0], entry[1])):
        if groups:
            longest = groups[-1][0][0]
            fits = (len(groups[-1]) + 1) * longest <= max_group_tokens
            if fits and longest - item[0] <= max(32, longest // 4):
                groups[-1].append(item)
                continue
        groups.append([item])
    if len(groups) == 1:
        groups[0].sort(key=lambda entry: entry[1])
    return groups


def _plan_sequence(
    begin: int,
    query_len: int,
    context_len: int,
    table: torch.Tensor,
    block_size: int,
    window: int | None,
    band: torch.Tensor,
) -> PrefillSequence:
    prefix = context_len - query_len
    first_key = max(0, prefix + 1 - window) if window is not None else 0
    rows = None
    if prefix:
        positions = torch.arange(first_key, context_len)
        keys = key_rows(table[positions // block_size] * block_size + positions % block_size, block_size)
        rows = torch.cat((keys, keys + block_size))
    elif window is None or window >= context_len:
        tile = Tile(begin, begin + query_len, 0, query_len, None)
        return PrefillSequence(begin, begin + query_len, None, (tile,))
    tiles = []
    for q_begin in range(0, query_len, TILE):
        q_end = min(q_begin + TILE, query_len)
        k_end = prefix + q_end
        k_begin = max(0, prefix + q_begin + 1 - window) if window is not None else 0
        mask = band[TILE - (q_end - q_begin) :, band.shape[1] - (k_end - k_begin) :]
        tiles.append(Tile(begin + q_begin, begin + q_end, k_begin - first_key, k_end - first_key, mask))
    return PrefillSequence(begin, begin + query_len, rows, tuple(tiles))


def _plan_group(
    group: list[tuple[int, int, int]],
    metadata: AttentionMetadata,
    tables: torch.Tensor,
    block_size: int,
    whole_batch: bool,
) -> DecodeGroup:
    lengths = torch.tensor([seen for seen, _, _ in group])
    sequences = torch.tensor([i for _, i, _ in group])
    last = torch.tensor([metadata.context_lens[i] - 1 for _, i, _ in group])
    longest = max(seen for seen, _, _ in group)
    offsets = torch.arange(longest)
    positions = torch.minimum((last + 1 - lengths)[:, None] + offsets, last[:, None])
    blocks = tables[sequences].gather(1, positions // block_size)
    keys = key_rows(blocks * block_size + positions % block_size, block_size).flatten()
    mask = None
    if any(seen != longest for seen, _, _ in group):
        padding = offsets >= lengths[:, None]
        mask = torch.zeros(len(group), longest).masked_fill_(padding, float("-inf"))[:, None, None, :]
    tokens = None if whole_batch else torch.tensor([row for _, _, row in group])
    return DecodeGroup(len(group), tokens, torch.cat((keys, keys + block_size)), mask)
