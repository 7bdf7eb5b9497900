"""Rows that have more candidates than can be listed, as hot or flat ones do: cut to a list by levels of their scores.

A sample of a row's tokens says about where the last one that the filters keep lies. Levels there part the row into
bins, of which one, the edge, has that token: every token of the bins above it is kept, and none below. Only the edge's
tokens are listed and searched. What the bins weigh is counted exactly, in integers: the sample decides how long the
list becomes, and nothing else. Finding a rank by a sample and counting what lies above is as old as SELECT (Floyd and
Rivest 1975, "Expected time bounds for selection").
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from workers.sampling.ops.triton.rows import mass_of, nucleus_mass, scores_of

LEVELS = 256
"""Levels of a row; bins are one more, numbered from the likeliest: the first and the last are what the levels leave."""
SAMPLES = 2
"""Tokens of each tile in the sample."""
_HALVINGS = tl.constexpr(12)
_FEWEST_TILES = tl.constexpr(32)
_EVERYTHING = tl.constexpr(2**62)
_MASSLESS = tl.constexpr(-22.2)
"""Tokens of a lower logit, less the largest, weigh nothing: e^-22.2 is less than `filters.MASS_UNIT`."""
_MASS_ASIDE, _COUNT_ASIDE = tl.constexpr(1.25), tl.constexpr(2.0)
"""How far the levels reach: the parts of the weight where the sample sees the last token, times and divided by this."""


@triton.jit
def looks_wide(
    tiles: tl.tensor, relative: tl.tensor, lowest: tl.tensor, least: tl.tensor, NUM_TILES: tl.constexpr
) -> tl.tensor:
    """Whether a fourth of the tiles have a candidate; never if so few have one that all of their tokens are listed."""
    having = tl.sum(((tiles >= lowest) & (relative >= least) & (tiles > float("-inf"))).to(tl.int32), axis=0)
    return having > tl.maximum(_FEWEST_TILES, NUM_TILES // 4)


@triton.jit
def levels_of(
    source: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    filters: tl.tensor,
    V: tl.constexpr,
    SAMPLED: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """(The score of the first level, levels of a unit of score) from `SAMPLED` tokens, a power of two.

    `source` is of `row_scores`, `filters` of `filters_of`; `total` is the sum of exp of all logits, less the largest
    and over the temperature.
    """
    coldness, top_k, top_p, _ = filters
    number = tl.arange(0, SAMPLED)
    SPAN: tl.constexpr = (V + SAMPLED - 1) // SAMPLED
    token_id = number * SPAN + number * 37 % SPAN
    mask = token_id < V
    relative = (scores_of(source, token_id, mask) - largest) * coldness
    floor = tl.min(tl.where(relative > float("-inf"), relative, 0.0), axis=0)
    stands_for = V / tl.sum(mask.to(tl.float32), axis=0)
    if top_k > 0:
        weight = tl.where(relative > float("-inf"), stands_for, 0.0)
        wanted = tl.sum(weight, axis=0) - top_k.to(tl.float32)  # below the last one
        aside = top_k.to(tl.float32)
        fewest, most = wanted - aside * (_COUNT_ASIDE - 1.0), wanted + aside * (1.0 - 1.0 / _COUNT_ASIDE)
    else:
        weight = tl.exp(relative) * stands_for
        wanted = (1.0 - top_p) * total
        fewest, most = wanted / _MASS_ASIDE, wanted * _MASS_ASIDE
        floor = tl.maximum(floor, _MASSLESS)
    # Between the lowest level with more below it than that, and the highest with less: tokens that are equal and weigh
    # as much as all of the span lie inside.
    first, first_low = floor * 0.0, floor + 0.0
    last, last_high = floor + 0.0, floor * 0.0
    for _ in range(_HALVINGS):
        middle, last_middle = 0.5 * (first + first_low), 0.5 * (last + last_high)
        more = tl.sum(tl.where(relative < middle, weight, 0.0), axis=0) > most
        less = tl.sum(tl.where(relative < last_middle, weight, 0.0), axis=0) <= fewest
        first, first_low = tl.where(more, middle, first), tl.where(more, first_low, middle)
        last, last_high = tl.where(less, last_middle, last), tl.where(less, last_high, last_middle)
    depth = tl.maximum((first - last) / coldness, 1e-30)
    return largest + first / coldness, (LEVELS - 1) / depth


@triton.jit
def bins_of(scores: tl.tensor, first: tl.tensor, per_unit: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """The bin of each score: a difference and then a product, of which no compiler makes another number."""
    below = tl.maximum(tl.minimum((first - scores) * per_unit, LEVELS - 1.0), 0.0)
    return below.to(tl.int32) + (below > 0.0).to(tl.int32)


@triton.jit
def weigh(
    weights_ptr: tl.tensor,
    bins: tl.tensor,
    chosen: tl.tensor,
    relative: tl.tensor,
    top_k: tl.tensor,
    LEVELS: tl.constexpr,
) -> None:
    """Add to each bin but the last what its chosen tokens weigh: 1 each for top-k, else their mass."""
    weight = tl.where(chosen, tl.where(top_k > 0, 1, mass_of(relative)), 0)
    tl.atomic_add(weights_ptr, tl.sum(tl.where(bins == 0, weight, 0), axis=0), sem="relaxed")
    tl.atomic_add(weights_ptr + bins, weight, mask=(bins > 0) & (bins < LEVELS) & (weight > 0), sem="relaxed")


@triton.jit
def edge_of(
    weights_ptr: tl.tensor, mass: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, V: tl.constexpr, LEVELS: tl.constexpr
) -> tl.tensor:
    """(The bin of the last token that is kept, what those above weigh); a bin that none has if all are kept."""
    needed = _EVERYTHING
    if (top_k > 0) & (top_k < V):
        needed = top_k.to(tl.int64)
    elif top_p < 1.0:
        needed = nucleus_mass(mass, top_p)
    bins = tl.arange(0, LEVELS)
    weights = tl.load(weights_ptr + bins)
    edge = tl.min(tl.where(tl.cumsum(weights, axis=0) >= needed, bins, LEVELS), axis=0)
    edge = tl.where(needed == _EVERYTHING, LEVELS + 1, edge)
    return edge, tl.sum(tl.where(bins < edge, weights, 0), axis=0)
