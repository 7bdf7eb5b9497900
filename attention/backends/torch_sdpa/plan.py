"""How a packed, paged batch becomes tiles of attention: planned once, used by every layer.

Keys and values are gathered token by token, never block by block: the unused slots of a last block may hold anything,
and a weight of zero does not tame a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from attention.backend import AttentionMetadata
from attention.backends.torch_sdpa.tiles import Band, Reach, Tile, masked_tiles, scored_tiles
from attention.backends.torch_sdpa.workspace import Landing, Workspace
from attention.errors import AttentionInputError
from attention.kv_cache import check_slots, key_rows
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec, AttentionType


@dataclass(frozen=True)
class Piece:
    """Some keys of one work, all of which are at hand at once.

    Attributes:
        rows: (2 * N * S,) int64, rows of its keys, then of its values, in the cache (see `kv_cache.key_rows`); None:
            they are the batch's own tokens.
        own: those tokens, in T.
        tiles: who attends to them.
        landing: where rows are gathered; None: in fresh memory.
    """

    rows: torch.Tensor | None
    own: slice
    tiles: tuple[Tile, ...]
    landing: Landing | None = None


@dataclass(frozen=True)
class Work:
    """N sequences that attend together: one of any kind, or several that bring one token each.

    Attributes:
        size: N.
        one_each: whether each brings one token, and sees all of the keys.
        tokens: their queries in T, a slice of one sequence or (N,) int64; None: all of T, in order.
        pieces: their keys; empty where there are none.
    """

    size: int
    one_each: bool
    tokens: slice | torch.Tensor | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class SdpaMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        store: (2, Tk) int64, see `kv_cache.store_rows`.
        may_skip: whether a row of it may be negative.
        works: everything there is to do.
        scored: whether scores must be written out, because `scaled_dot_product_attention` cannot express them.
        merges: whether any work has several pieces, whose denominators are needed.
        alibi_slopes: (Hq,) float32, or None.
    """

    store: torch.Tensor
    may_skip: bool
    works: tuple[Work, ...]
    scored: bool
    merges: bool
    alibi_slopes: torch.Tensor | None


@dataclass(frozen=True)
class Limits:
    """What a backend wants at a time, in tokens.

    Attributes:
        group: keys of decoding sequences that attend together, padding included; 0: every sequence on its own.
        piece: keys that one sequence gathers at a time; None: all of them.
        workspace: holds a group, and a piece; None: every layer takes fresh memory.
    """

    group: int
    piece: int | None
    workspace: Workspace | None = None


SCORED_KEYS = 512
"""Keys per piece where scores are written out."""


def needs_scores(spec: AttentionSpec, common: CommonAttentionMetadata) -> bool:
    """Whether `scaled_dot_product_attention` cannot express what is asked, or not without masks as large as scores."""
    layer = spec.logits_soft_cap is not None or spec.alibi_slopes is not None
    return layer or common.tree_mask is not None or common.custom_mask is not None


class Planner:
    """Plans one batch.

    Args:
        spec: the layers.
        common: the batch.
        block_size: tokens in a block.
        limits: what to do at a time.
        scored: whether scores are written out.
    """

    def __init__(
        self, spec: AttentionSpec, common: CommonAttentionMetadata, block_size: int, limits: Limits, scored: bool
    ) -> None:
        self._spec = spec
        self._common = common
        self._block_size = block_size
        self._scored = scored
        self._fp8 = spec.fp8_cache
        self._device = common.block_tables.device
        self._limits = replace(limits, piece=min(limits.piece or SCORED_KEYS, SCORED_KEYS)) if scored else limits
        check_slots(common.slot_mapping, common.slot_mapping.numel())
        keys = key_rows(common.slot_mapping, block_size)
        self._store = torch.stack((keys, keys + block_size))
        self._tables = common.block_tables.long()

    def plan(self, alibi_slopes: torch.Tensor | None) -> SdpaMetadata:
        """The whole batch; `alibi_slopes` is handed on."""
        common, spec = self._common, self._spec
        masked = common.tree_mask is not None or common.custom_mask is not None
        single: list[tuple[int, int, int]] = []
        works: list[Work] = []
        begin = area = 0
        band: Band | None = None
        for i, (queries, keys) in enumerate(zip(common.query_lens, common.context_lens, strict=True)):
            if queries == 1 and keys and spec.attn_type.cached and not masked:
                single.append((_visible(keys, spec.sliding_window), i, begin))
            else:
                band = band or Band(Reach.of(spec), common.max_seq_len, self._device, self._device.type == "cpu")
                works.append(self._sequence(i, begin, area, band))
            begin += queries
            area += queries * keys
        groups = group_by_length(single, self._limits.group)
        whole = len(groups) == 1 and not works
        works += [self._group(group, whole) for group in groups]
        merges = any(len(work.pieces) > 1 for work in works)
        may_skip = self._device.type != "cpu" or bool((common.slot_mapping < 0).any())
        return SdpaMetadata(common, self._store, may_skip, tuple(works), self._scored, merges, alibi_slopes)

    def _sequence(self, i: int, begin: int, area: int, band: Band) -> Work:
        common, reach = self._common, Reach.of(self._spec)
        num_queries, num_keys = common.query_lens[i], common.context_lens[i]
        cross = self._spec.attn_type is AttentionType.ENCODER_DECODER
        prefix = 0 if cross else num_keys - num_queries
        queries = range(prefix, prefix + num_queries)
        custom = None
        if common.custom_mask is not None:
            custom = common.custom_mask[area : area + num_queries * num_keys].view(num_queries, num_keys)
        pieces = []
        for keys in self._cut(num_keys, num_keys if cross else prefix, custom is not None):
            own = slice(begin + keys.start - prefix, begin + keys.stop - prefix)
            rows = None
            if cross or keys.start < prefix or self._fp8:
                rows = self._rows(i, keys)
            if self._scored:
                mask = self._mask(custom, keys, prefix)
                tiles = tuple(scored_tiles(queries, keys, reach, mask))
            else:
                tiles = tuple(masked_tiles(queries, keys, reach, band))
            pieces.append(Piece(rows, own, tiles, self._land(rows, 1, len(keys))))
        return Work(1, False, slice(begin, begin + num_queries), tuple(pieces))

    def _cut(self, num_keys: int, prefix: int, all_visible: bool) -> Iterator[range]:
        """A sequence's keys in pieces; those before and those among its queries apart, where there are several."""
        window = self._spec.sliding_window
        first = max(0, prefix + 1 - window) if window is not None and not all_visible else 0
        limit = self._limits.piece
        if not self._scored and (prefix == 0 or limit is None or num_keys - first <= limit):
            gathered = prefix or self._fp8
            yield from _split(first, num_keys, limit if gathered else None)
            return
        yield from _split(first, prefix, limit)
        yield from _split(prefix, num_keys, limit if self._scored or self._fp8 else None)

    def _mask(self, custom: torch.Tensor | None, keys: range, prefix: int) -> torch.Tensor | None:
        if custom is not None:
            return custom[:, keys.start : keys.stop]
        if self._common.tree_mask is not None and keys.start >= prefix:
            return self._common.tree_mask[:, keys.start - prefix : keys.stop - prefix]
        return None

    def _rows(self, i: int, keys: range) -> torch.Tensor:
        positions = torch.arange(keys.start, keys.stop, device=self._device)
        slots = self._tables[i][positions // self._block_size] * self._block_size + positions % self._block_size
        rows = key_rows(slots, self._block_size)
        return torch.cat((rows, rows + self._block_size))

    def _group(self, group: list[tuple[int, int, int]], whole_batch: bool) -> Work:
        """Decoding sequences; the shorter ones repeat their first key before it, so that all end together."""
        longest = max(seen for seen, _, _ in group)
        if len(group) == 1:
            (_, i, row) = group[0]
            pieces = tuple(self._single(i, longest))
            return Work(1, True, None if whole_batch else slice(row, row + 1), pieces)
        sequences, last, lengths = (
            torch.tensor(column, device=self._device)
            for column in zip(*((i, self._common.context_lens[i] - 1, seen) for seen, i, _ in group), strict=True)
        )
        offsets = torch.arange(1 - longest, 1, device=self._device)
        positions = torch.maximum(last[:, None] + offsets, (last + 1 - lengths)[:, None])
        blocks = self._tables[sequences].gather(1, positions // self._block_size)
        keys = key_rows(blocks * self._block_size + positions % self._block_size, self._block_size).flatten()
        mask = None
        if any(seen != longest for seen, _, _ in group):
            seen = offsets > -lengths[:, None]
            mask = seen[:, None] if self._scored else self._additive(seen)[:, None, None]
        tile = Tile(0, 1, 0, longest, mask, behind=longest - 1)
        rows = torch.cat((keys, keys + self._block_size))
        tokens = None if whole_batch else torch.tensor([row for _, _, row in group], device=self._device)
        return Work(
            len(group), True, tokens, (Piece(rows, slice(0, 0), (tile,), self._land(rows, len(group), longest)),)
        )

    def _single(self, i: int, seen: int) -> Iterator[Piece]:
        context = self._common.context_lens[i]
        for keys in _split(context - seen, context, self._limits.piece):
            tile = Tile(0, 1, 0, len(keys), behind=context - 1 - keys.start)
            rows = self._rows(i, keys)
            yield Piece(rows, slice(0, 0), (tile,), self._land(rows, 1, len(keys)))

    def _land(self, rows: torch.Tensor | None, count: int, keys: int) -> Landing | None:
        workspace = self._limits.workspace
        return None if rows is None or workspace is None else workspace.land(count, keys)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cpu":
            return seen
        return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


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


def check_batch(spec: AttentionSpec, common: CommonAttentionMetadata) -> None:
    """Refuse masks that contradict the layer.

    Raises:
        AttentionInputError: a tree or custom mask for cross attention.
    """
    if spec.attn_type is AttentionType.ENCODER_DECODER and common.tree_mask is not None:
        raise AttentionInputError("a tree mask is of tokens among themselves; cross attention has none")


def _visible(context_len: int, sliding_window: int | None) -> int:
    """How many tokens the last of `context_len` tokens sees, itself included."""
    return context_len if sliding_window is None else min(context_len, sliding_window)


def _split(begin: int, end: int, limit: int | None) -> Iterator[range]:
    """A range in pieces of similar length, at most `limit` each."""
    if begin >= end:
        return
    pieces = 1 if limit is None else -(-(end - begin) // limit)
    for i in range(pieces):
        yield range(begin + (end - begin) * i // pieces, begin + (end - begin) * (i + 1) // pieces)
