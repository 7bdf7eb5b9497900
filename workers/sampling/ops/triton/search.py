"""The search for what a row's filters leave, and the draw from it: the end of `sample_tokens` for filtered rows."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from workers.sampling.ops.triton.rows import gumbel, mass_of, nucleus_mass, order_key, scores_of


@triton.jit
def search_and_draw(
    source: tl.tensor,
    where: tl.tensor,
    how: tl.tensor,
    keep: tl.tensor,
    key: tl.tensor,
    V: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """The row's token and its value with noise, from the candidates that are listed or from the whole row.

    `source` is of `row_scores`; `where` is (list, number of candidates); `how` is (largest score, 1 / temperature, low
    bits of an order key that say nothing); `keep` is (least score of a candidate, ln(min-p), top-k, top-p, mass of what
    min-p leaves, which counts where there is no top-k, weight of the likelier tokens that are kept and not searched
    here); `key` is the row's noise. The token is `V`, its value minus infinity, if none is left.

    Finds the least order key that the filters leave: the largest key from which on there are k tokens, then the
    largest with enough mass. FlashInfer and vLLM search for pivots likewise, among floating-point probabilities
    (https://flashinfer.ai/2025/03/10/sampling.html; Qrita); keys and masses here are integers and every step ends at
    a key that is there, so that the search is short and its result that of sorting.
    """
    lowest, log_min_p, top_k, top_p, total, beside = keep
    low = (order_key(lowest) >> how[2]).to(tl.int64)
    if log_min_p > float("-inf"):
        low = tl.maximum(low, _least_key(how, log_min_p, low))
    last_id = V
    if top_k > 0:
        low = _search(source, where, how, low, top_k.to(tl.int64) - beside, False, LISTED, SPAN)
        if top_p < 1.0:
            total, _, _ = _weigh(source, where, how, low, True, LISTED, SPAN)
    if top_p < 1.0:
        needed = nucleus_mass(total, top_p) - beside
        low = _search(source, where, how, low, needed, True, LISTED, SPAN)
        above, _, _ = _weigh(source, where, how, low + 1, True, LISTED, SPAN)
        each = tl.maximum(mass_of(_relative(_score_of_key(low, how[2]), how)), 1)
        wanted = tl.maximum((needed - above + each - 1) // each, 1)
        last_id = _nth_equal(source, where, how, low, wanted, V, LISTED, SPAN)
    return _draw(source, where, how, low, last_id, key, V, LISTED, SPAN)


@triton.jit
def _span(source: tl.tensor, where: tl.tensor, begin: tl.tensor, LISTED: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """Ids and scores of `SPAN` candidates, and which of them there are."""
    token_id = begin + tl.arange(0, SPAN)
    mask = token_id < where[1]
    if LISTED:
        token_id = tl.load(where[0] + token_id, mask=mask, other=0)
    return token_id, scores_of(source, token_id, mask), mask


@triton.jit
def _relative(score: tl.tensor, how: tl.tensor) -> tl.tensor:
    return (score - how[0]) * how[1]


@triton.jit
def _score_of_key(key: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """The score whose order key, shifted, this is."""
    whole = (key << shift) | tl.where(key < 0, (1 << shift) - 1, 0)
    bits = whole.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _least_key(how: tl.tensor, log_min_p: tl.tensor, low: tl.tensor) -> tl.tensor:
    """The least order key that min-p leaves, from `low` on."""
    high = (order_key(how[0]) >> how[2]).to(tl.int64)
    while low < high:
        middle = low + (high - low) // 2
        if _relative(_score_of_key(middle, how[2]), how) >= log_min_p:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _weigh(
    source: tl.tensor,
    where: tl.tensor,
    how: tl.tensor,
    middle: tl.tensor,
    BY_MASS: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """How many tokens have a key from `middle` on, or their mass; the least such key, and the largest one below."""
    weight = tl.zeros((SPAN,), tl.int64)  # added up at the end: until then no thread waits for another
    least = tl.full((SPAN,), 2**31 - 1, tl.int32)
    below = tl.full((SPAN,), -(2**31), tl.int32)
    begin = 0
    while begin < where[1]:
        _, scores, mask = _span(source, where, begin, LISTED, SPAN)
        key = order_key(scores) >> how[2]
        kept = mask & (key >= middle)
        if BY_MASS:
            weight += tl.where(kept, mass_of(_relative(scores, how)), 0)
        else:
            weight += kept.to(tl.int64)
        least = tl.minimum(least, tl.where(kept, key, 2**31 - 1))
        below = tl.maximum(below, tl.where(mask & (key < middle), key, -(2**31)))
        begin += SPAN
    return tl.sum(weight, axis=0), tl.min(least, axis=0), tl.max(below, axis=0)


@triton.jit
def _search(
    source: tl.tensor,
    where: tl.tensor,
    how: tl.tensor,
    low: tl.tensor,
    needed: tl.tensor,
    BY_MASS: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """The largest key from which on the tokens weigh enough; `low` if they do not from any key above."""
    high = (order_key(how[0]) >> how[2]).to(tl.int64)
    while low < high:
        middle = high - (high - low) // 2
        weight, least, below = _weigh(source, where, how, middle, BY_MASS, LISTED, SPAN)
        if weight >= needed:
            low = least.to(tl.int64)
        else:
            high = tl.maximum(below.to(tl.int64), low)
    return low


@triton.jit
def _nth_equal(
    source: tl.tensor,
    where: tl.tensor,
    how: tl.tensor,
    key: tl.tensor,
    wanted: tl.tensor,
    V: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """The least id up to which so many tokens have this key; `V` if fewer have it."""
    found = V
    if LISTED:  # in no order
        low = 0
        if _num_equal(source, where, how, key, V, SPAN) > wanted:
            while low < found:
                middle = (low + found) // 2
                if _num_equal(source, where, how, key, middle, SPAN) >= wanted:
                    found = middle
                else:
                    low = middle + 1
    else:
        begin = 0
        number = tl.zeros((), tl.int64)
        while (begin < V) & (number < wanted):
            token_id, scores, mask = _span(source, where, begin, LISTED, SPAN)
            equal = (mask & ((order_key(scores) >> how[2]) == key)).to(tl.int32)
            here = tl.sum(equal, axis=0)
            if number + here >= wanted:
                reached = number + tl.cumsum(equal, axis=0) >= wanted
                found = tl.min(tl.where(reached, token_id, V), axis=0)
            number += here
            begin += SPAN
    return found


@triton.jit
def _num_equal(
    source: tl.tensor, where: tl.tensor, how: tl.tensor, key: tl.tensor, last_id: tl.tensor, SPAN: tl.constexpr
) -> tl.tensor:
    """How many listed tokens have this key and an id up to `last_id`."""
    number = tl.zeros((), tl.int32)
    begin = 0
    while begin < where[1]:
        token_id, scores, mask = _span(source, where, begin, True, SPAN)
        equal = mask & ((order_key(scores) >> how[2]) == key) & (token_id <= last_id)
        number += tl.sum(equal.to(tl.int32), axis=0)
        begin += SPAN
    return number


@triton.jit
def _draw(
    source: tl.tensor,
    where: tl.tensor,
    how: tl.tensor,
    low: tl.tensor,
    last_equal: tl.tensor,
    key: tl.tensor,
    V: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """The best, with noise, of the tokens with a larger order key than `low`, or with this one and an id in time."""
    best = tl.full((SPAN,), float("-inf"), tl.float32)
    best_id = tl.full((SPAN,), V, tl.int32)
    begin = 0
    while begin < where[1]:
        token_id, scores, mask = _span(source, where, begin, LISTED, SPAN)
        order = order_key(scores) >> how[2]
        kept = mask & ((order > low) | ((order == low) & (token_id <= last_equal)))
        value = tl.where(kept, _relative(scores, how) + gumbel(key, token_id), float("-inf"))
        better = (value > best) | ((value == best) & kept & (token_id < best_id))
        best_id = tl.where(better, token_id, best_id)
        best = tl.where(better, value, best)
        begin += SPAN
    value = tl.max(best, axis=0)
    return value, tl.min(tl.where(best == value, best_id, V), axis=0)
