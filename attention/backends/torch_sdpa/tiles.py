"""Which queries attend to which keys together: one sequence's share of the scores, cut into rectangles.

Positions are those in the sequence. A query sees the keys within its reach: from so many before it to so many behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from attention.spec import AttentionSpec

MASKED_ROWS = 256
"""Query rows per tile where a mask is needed: bounds the mask, and the keys a tile cannot see are left out."""
SCORED_ROWS = 128
"""Query rows per tile where the scores are written out: bounds them."""


@dataclass(frozen=True)
class Tile:
    """Queries and keys that attend together.

    Attributes:
        q_begin: first query, counted in the work's.
        q_end: one past the last query.
        k_begin: first key, counted in the piece's.
        k_end: one past the last key.
        mask: broadcasts over (sequences, ..., queries, keys). To `scaled_dot_product_attention`: added to the scores
            (float32), or True where visible (bool). To written-out scores: True where visible, in place of the
            layer's rule.
        causal: whether it is square and each query sees its own key and those before it.
        behind: position of the first query minus that of the first key.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    mask: torch.Tensor | None = None
    causal: bool = False
    behind: int = 0


@dataclass(frozen=True)
class Reach:
    """How far a query sees.

    Attributes:
        back: tokens before its own; None: all.
        ahead: tokens behind its own; None: all.
    """

    back: int | None
    ahead: int | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> Reach:
        """What a layer's causality and sliding window come to."""
        span = None if spec.sliding_window is None else spec.sliding_window - 1
        return cls(span, 0 if spec.causal else span)

    def queries(self, q: range, k: range) -> range:
        """Those of the queries that see any of the keys."""
        begin = q.start if self.ahead is None else max(q.start, k.start - self.ahead)
        return range(begin, q.stop if self.back is None else min(q.stop, k.stop + self.back))

    def keys(self, q: range, k: range) -> range:
        """Those of the keys that any of the queries sees."""
        begin = k.start if self.back is None else max(k.start, q.start - self.back)
        return range(begin, k.stop if self.ahead is None else min(k.stop, q.stop + self.ahead))

    def complete(self, q: range, k: range) -> bool:
        """Whether each of the queries sees each of the keys."""
        all_back = self.back is None or q.stop - 1 - self.back <= k.start
        return all_back and (self.ahead is None or k.stop - 1 <= q.start + self.ahead)


class Band:
    """Masks of tiles, all cut out of one: what a query sees depends on its distance to the key only.

    Args:
        reach: of every query.
        longest: keys of the longest sequence.
        device: of the masks.
        additive: whether masks are float32 to be added, 0 and -inf, or bool, True where visible.
    """

    def __init__(self, reach: Reach, longest: int, device: torch.device, additive: bool) -> None:
        self._reach = reach
        self._back = longest if reach.back is None else min(reach.back, longest)
        self._ahead = longest if reach.ahead is None else min(reach.ahead, longest)
        self._rows = min(MASKED_ROWS, longest)
        self._device = device
        self._additive = additive

    @cached_property
    def _whole(self) -> torch.Tensor:
        """(rows, keys): row r and column c stand for a key `c - r - back` behind its query."""
        columns = torch.arange(self._back + self._rows + self._ahead, device=self._device)
        distance = columns - torch.arange(self._back, self._back + self._rows, device=self._device)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self._reach.back is not None:
            seen &= distance >= -self._reach.back
        if self._reach.ahead is not None:
            seen &= distance <= self._reach.ahead
        return (
            torch.zeros(seen.shape, device=self._device).masked_fill_(~seen, float("-inf")) if self._additive else seen
        )

    def cut(self, q: range, k: range) -> torch.Tensor:
        """(queries, keys) of at most `MASKED_ROWS` queries and keys that they reach."""
        shift = self._back - q.start
        return self._whole[: len(q), k.start + shift : k.stop + shift]


def masked_tiles(queries: range, keys: range, reach: Reach, band: Band) -> Iterator[Tile]:
    """Tiles for `scaled_dot_product_attention`: as large as can be where no mask is needed. No row of one is blind.

    Args:
        queries: positions of a sequence's queries.
        keys: positions of the keys at hand.
        reach: of every query.
        band: masks.
    """
    seeing = reach.queries(queries, keys)
    for part in _parts(seeing, keys, reach):
        seen = reach.keys(part, keys)
        complete = reach.complete(part, seen)
        causal = not complete and reach.back is None and reach.ahead == 0 and part == seen
        rows = len(part) if complete or causal else MASKED_ROWS
        for begin in range(part.start, part.stop, rows):
            q = range(begin, min(begin + rows, part.stop))
            k = reach.keys(q, keys)
            mask = None if causal or reach.complete(q, k) else band.cut(q, k)
            yield _tile(queries, keys, q, k, mask, causal)


def _parts(seeing: range, keys: range, reach: Reach) -> list[range]:
    """Queries among the keys apart from those behind them, where the latter see all keys."""
    if reach.back is None and reach.ahead == 0 and seeing.start < keys.stop < seeing.stop:
        return [range(seeing.start, keys.stop), range(keys.stop, seeing.stop)]
    return [seeing] if seeing else []


def scored_tiles(queries: range, keys: range, reach: Reach, mask: torch.Tensor | None) -> Iterator[Tile]:
    """Tiles whose scores are written out; the layer's own rule is applied by position, so no mask is made for it.

    Args:
        queries: positions of a sequence's queries.
        keys: positions of the keys at hand.
        reach: of every query, where there is no mask.
        mask: (queries, keys) bool, in place of the reach.
    """
    seeing = reach.queries(queries, keys) if mask is None else queries
    for begin in range(seeing.start, seeing.stop, SCORED_ROWS):
        q = range(begin, min(begin + SCORED_ROWS, seeing.stop))
        if mask is None:
            yield _tile(queries, keys, q, reach.keys(q, keys), None, False)
        else:
            rows = mask[q.start - queries.start : q.stop - queries.start]
            yield _tile(queries, keys, q, keys, rows, False)


def _tile(queries: range, keys: range, q: range, k: range, mask: torch.Tensor | None, causal: bool) -> Tile:
    return Tile(
        q_begin=q.start - queries.start,
        q_end=q.stop - queries.start,
        k_begin=k.start - keys.start,
        k_end=k.stop - keys.start,
        mask=mask,
        causal=causal,
        behind=q.start - k.start,
    )
