"""The kernels that find, without sorting, the few tokens that can pass a row's filters.

A row is cut into tiles; each tile's largest score, and the sum of its probabilities, bound from below what the filters
keep: the k-th largest of the tiles' largest is no more than the k-th largest score, and so on. What is not below the
bound is a candidate. There are hardly more candidates than tokens that pass, where these are few; and no bound is
needed to be right. The bound by tiles stands where Qrita (Park et al. 2026, arXiv:2602.01518) has a cut by the spread
of a normal distribution, to the same end: that all further search goes through few tokens.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.triton.rows import (
    filters_of,
    is_asking,
    is_filtered,
    mass_of,
    order_key,
    row_scores,
    scores_of,
)
from workers.sampling.ops.triton.wide_rows import LEVELS, SAMPLES, bins_of, levels_of, looks_wide, weigh

PIECE = 2048
"""Tokens that one program looks at."""
TILE = 128
CAPACITY = 4096
"""Candidates of a row that are listed. Rows that look as if there were more are treated as `wide_rows` are; of others
that have more, all tokens are searched."""
WIDE = -1
"""Stands for the number of a wide row's candidates."""
BOUNDS = 6
"""Numbers that are known of a row."""
_NUM_WARPS = 4
_WIDE = tl.constexpr(WIDE)
_LEAST = tl.constexpr(-32.0)
_HALVINGS = tl.constexpr(14)
_SLACK = tl.constexpr(0.99)


class Candidates(NamedTuple):
    """What is known of each of N rows.

    Attributes:
        bounds: float32 (N, `BOUNDS`): the largest score; the least score of a candidate; the least score less the
            largest and over the temperature of one; ln of the sum of exp of those of all tokens; what `levels_of` says
            of a wide row.
        counts: int32 (N,), candidates; more than `CAPACITY` where they are not all listed, whatever their number;
            `WIDE` of a wide row.
        masses: int64 (N,), of the tokens that min-p leaves, where there is no top-k.
        token_ids: int32 (N, CAPACITY), in no order.
        edge_counts: int32 (N,), zero: for the tokens on a wide row's edge.
        weights: int64 (N, LEVELS), of a wide row's bins but the last.
    """

    bounds: torch.Tensor
    counts: torch.Tensor
    masses: torch.Tensor
    token_ids: torch.Tensor
    edge_counts: torch.Tensor
    weights: torch.Tensor


@triton.jit
def tiles_kernel(
    largest_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    marks_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    RAW: tl.constexpr,
) -> None:
    """One program: the tiles of `PIECE` tokens of a row; sums are relative to the tile's largest."""
    PIECES: tl.constexpr = (V + PIECE - 1) // PIECE
    TILES: tl.constexpr = PIECE // TILE
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    if is_asking(words_ptr, tokens_ptr, row, RAW):
        coldness, _, _, _ = filters_of(words_ptr, row, RAW)
        token_id = tl.program_id(0) % PIECES * PIECE + tl.arange(0, PIECE)
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, RAW)
        scores = tl.reshape(scores_of(source, token_id, token_id < V), (TILES, TILE))
        largest = tl.max(scores, axis=1)
        base = tl.where(largest > float("-inf"), largest, 0.0)
        sums = tl.sum(tl.exp((scores - base[:, None]) * coldness), axis=1)
        place = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
        tl.store(largest_ptr + place, largest)
        tl.store(sums_ptr + place, sums)


@triton.jit
def bounds_kernel(
    bounds_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    edge_counts_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    marks_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    V: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLED: tl.constexpr,
    LEVELS: tl.constexpr,
    BOUNDS: tl.constexpr,
    GATHER: tl.constexpr,
    RAW: tl.constexpr,
) -> None:
    """One program: a row's bounds from its tiles; its token becomes -1 where every score is minus infinity."""
    row = tl.program_id(0).to(tl.int64)
    if is_asking(words_ptr, tokens_ptr, row, RAW):
        coldness, top_k, top_p, least = filters_of(words_ptr, row, RAW)
        tile = tl.arange(0, TILES_PADDED)
        mask = tile < TILES
        tiles = tl.load(largest_ptr + row * TILES + tile, mask=mask, other=float("-inf"))
        largest = tl.max(tiles, axis=0)
        if largest == float("-inf"):
            tl.store(tokens_ptr + row, -1)
        relative = (tiles - largest) * coldness
        mass = tl.exp(relative) * tl.load(sums_ptr + row * TILES + tile, mask=mask, other=0.0)
        total = tl.sum(mass, axis=0)
        lowest = _kth_largest(tiles, top_k, TILES)
        filtered = is_filtered(top_k, top_p, least)
        filters = coldness, top_k, top_p, least
        if (top_k == 0) & (top_p < 1.0):
            least = tl.maximum(least, _nucleus_bound(relative, mass, (1.0 - top_p) * total * _SLACK, TILE))
        bounds = bounds_ptr + row * BOUNDS
        tl.store(bounds, largest)
        tl.store(bounds + 1, lowest)
        tl.store(bounds + 2, least)
        tl.store(bounds + 3, tl.log(total))
        if GATHER:
            count = 0
            if not RAW:  # nobody wants so many log-probabilities
                one_search = filtered & ((top_k == 0) | (top_p >= 1.0)) & (largest > float("-inf"))
                if one_search & looks_wide(tiles, relative, lowest, least, (V + TILE - 1) // TILE):
                    source = row_scores(
                        logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, RAW
                    )
                    first, per_unit = levels_of(source, largest, total, filters, V, SAMPLED, LEVELS)
                    tl.store(bounds + 4, first)
                    tl.store(bounds + 5, per_unit)
                    tl.store(edge_counts_ptr + row, 0)
                    tl.store(weights_ptr + row * LEVELS + tl.arange(0, LEVELS), tl.zeros((LEVELS,), tl.int64))
                    count = _WIDE
            tl.store(counts_ptr + row, count)
            tl.store(masses_ptr + row, tl.zeros((), tl.int64))


@triton.jit
def _kth_largest(scores: tl.tensor, k: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """The k-th largest of these scores; minus infinity if k is 0 or there are fewer."""
    keys = order_key(scores).to(tl.int64)
    high = tl.max(keys, axis=0)
    low = tl.min(keys, axis=0)
    if (k > 0) & (k <= COUNT):
        while low < high:
            middle = high - (high - low) // 2
            if tl.sum((keys >= middle).to(tl.int32), axis=0) >= k:
                low = middle
            else:
                high = middle - 1
        found = tl.max(tl.where(keys == low, scores, float("-inf")), axis=0)
    else:
        found = float("-inf")
    return found


@triton.jit
def _nucleus_bound(relative: tl.tensor, mass: tl.tensor, spare: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """A level with no more mass below it than `spare`, hence none of the nucleus; minus infinity if none is found.

    Below a level are all of a tile whose largest is, and of any other no more than all but its largest, and no more
    than `TILE - 1` tokens that just miss the level.
    """
    rest = mass - tl.exp(relative)
    high = 0.0
    low = _LEAST
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = tl.where(relative < middle, mass, tl.minimum(rest, (TILE - 1) * tl.exp(middle)))
        fits = tl.sum(below, axis=0) <= spare
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return tl.where(low > _LEAST, low, float("-inf"))


@triton.jit
def gather_kernel(
    token_ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    marks_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    CAPACITY: tl.constexpr,
    LEVELS: tl.constexpr,
    BOUNDS: tl.constexpr,
    RAW: tl.constexpr,
) -> None:
    """One program: lists the candidates among `PIECE` tokens of a row that has a filter, or weighs them where it is
    wide, and adds up the mass that min-p leaves."""
    PIECES: tl.constexpr = (V + PIECE - 1) // PIECE
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    coldness, top_k, top_p, log_min_p = filters_of(words_ptr, row, RAW)
    if is_filtered(top_k, top_p, log_min_p) & is_asking(words_ptr, tokens_ptr, row, RAW):
        token_id = tl.program_id(0) % PIECES * PIECE + tl.arange(0, PIECE)
        mask = token_id < V
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, RAW)
        scores = scores_of(source, token_id, mask)
        bounds = bounds_ptr + row * BOUNDS
        relative = (scores - tl.load(bounds)) * coldness
        chosen = mask & (scores >= tl.load(bounds + 1)) & (relative >= tl.load(bounds + 2))
        wide = False
        if not RAW:
            wide = tl.load(counts_ptr + row, volatile=True) == _WIDE
        if wide:
            if (top_k > 0) | (top_p < 1.0):
                bins = bins_of(scores, tl.load(bounds + 4), tl.load(bounds + 5), LEVELS)
                weigh(weights_ptr + row * LEVELS, bins, chosen, relative, top_k, LEVELS)
        else:
            count = tl.sum(chosen.to(tl.int32), axis=0)
            if count > CAPACITY // 8:  # it would take long to list them, to no end: there will be too many
                tl.atomic_add(counts_ptr + row, CAPACITY + 1)
            elif count > 0:
                begin = tl.atomic_add(counts_ptr + row, count)
                place = begin + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
                tl.store(token_ids_ptr + row * CAPACITY + place, token_id, mask=chosen & (place < CAPACITY))
        if (top_k == 0) & (top_p < 1.0):
            mass = tl.sum(tl.where(relative >= log_min_p, mass_of(relative), 0), axis=0)
            tl.atomic_add(masses_ptr + row, mass)


def find_candidates(
    logits: torch.Tensor, rows: ChoiceRows, tokens: torch.Tensor, raw: bool, gather: bool = True
) -> Candidates:
    """The bounds of every row that asks for something and, if `gather`, the candidates of those with a filter.

    Args:
        logits: (N, V), the elements of a row contiguous.
        rows: how each row wants it.
        tokens: int64 (N,); becomes -1 where every score is minus infinity.
        raw: of the logits as they are, with a row's number of log-probabilities as its top-k.
        gather: whether to list candidates.
    """
    num_rows, vocab_size = logits.shape
    device, piece = logits.device, min(PIECE, max(TILE, triton.next_power_of_2(vocab_size)))
    pieces = triton.cdiv(vocab_size, piece)
    tiles = pieces * (piece // TILE)
    largest, sums = torch.empty(2, num_rows, tiles, dtype=torch.float32, device=device).unbind(0)
    listed = num_rows if gather else 0
    found = Candidates(
        torch.empty(num_rows, BOUNDS, dtype=torch.float32, device=device),
        torch.empty(listed, dtype=torch.int32, device=device),
        torch.empty(listed, dtype=torch.int64, device=device),
        torch.empty(listed, CAPACITY, dtype=torch.int32, device=device),
        torch.empty(listed, dtype=torch.int32, device=device),
        torch.empty(listed, LEVELS, dtype=torch.int64, device=device),
    )
    batch = (logits, logits.stride(0), *rows.pointers, tokens)
    with on_device(logits):
        tiles_kernel[(num_rows * pieces,)](
            largest, sums, *batch, V=vocab_size, PIECE=piece, TILE=TILE, RAW=raw, num_warps=_NUM_WARPS
        )
        bounds_kernel[(num_rows,)](
            *(found.bounds, found.counts, found.masses, found.edge_counts, found.weights, largest, sums, *batch),
            V=vocab_size,
            TILES=tiles,
            TILES_PADDED=triton.next_power_of_2(tiles),
            TILE=TILE,
            SAMPLED=SAMPLES * triton.next_power_of_2(tiles),
            LEVELS=LEVELS,
            BOUNDS=BOUNDS,
            GATHER=gather,
            RAW=raw,
            num_warps=4,
        )
        if gather:
            gather_kernel[(num_rows * pieces,)](
                *(found.token_ids, found.counts, found.masses, found.weights, found.bounds, *batch),
                V=vocab_size,
                PIECE=piece,
                CAPACITY=CAPACITY,
                LEVELS=LEVELS,
                BOUNDS=BOUNDS,
                RAW=raw,
                num_warps=_NUM_WARPS,
            )
    return found
