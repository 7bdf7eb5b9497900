"""The kernels of `sample_tokens`: the best of each piece of the vocabulary, then one token for each row."""
# ruff: noqa: N803, N806, SIM102  # compile-time constants are upper case; what they switch off is not compiled

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device
from workers.sampling.ops import penalties, row_params
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.triton.candidates import BOUNDS, CAPACITY, WIDE, find_candidates
from workers.sampling.ops.triton.rows import (
    filters_of,
    gumbel,
    is_asking,
    is_drawn,
    is_filtered,
    noise_key,
    row_scores,
    scores_of,
)
from workers.sampling.ops.triton.search import search_and_draw
from workers.sampling.ops.triton.wide_rows import LEVELS, bins_of, edge_of

_PIECE, _LIST_SPAN, _SPAN, _NUM_WARPS = 1024, 512, 4096, 8
_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
"""Low bits of a score's order key that say nothing, where the scores are the logits."""
_WORDS, _SLOT = tl.constexpr(row_params.WORDS), tl.constexpr(row_params.SLOT)
_BIAS_SLOT = tl.constexpr(row_params.BIAS_SLOT)
_OUTPUT = tl.constexpr(penalties.OUTPUT)
_WIDE = tl.constexpr(WIDE)


@triton.jit
def draw_kernel(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    edge_ids_ptr: tl.tensor,
    edge_counts_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    weights_ptr: tl.tensor,
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
    FILTERED: tl.constexpr,
) -> None:
    """One program: the best of `PIECE` tokens of a row, with noise unless it is greedy; of a wide row, of those above
    the edge, and it lists those on the edge. Nothing for a row whose candidates are listed."""
    PIECES: tl.constexpr = (V + PIECE - 1) // PIECE
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    coldness, top_k, top_p, log_min_p = filters_of(words_ptr, row, False)
    drawn_here = is_asking(words_ptr, tokens_ptr, row, False)
    wide = False
    if FILTERED:
        if drawn_here & is_filtered(top_k, top_p, log_min_p):
            wide = tl.load(counts_ptr + row) == _WIDE
            drawn_here = wide
    if drawn_here:
        token_id = tl.program_id(0) % PIECES * PIECE + tl.arange(0, PIECE)
        mask = token_id < V
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, False)
        value = scores_of(source, token_id, mask)
        bounds = bounds_ptr + row * BOUNDS
        kept = mask
        if FILTERED:
            if wide:
                relative = (value - tl.load(bounds)) * coldness
                kept = mask & (value >= tl.load(bounds + 1)) & (relative >= tl.load(bounds + 2))
                edge, _ = edge_of(weights_ptr + row * LEVELS, tl.load(masses_ptr + row), top_k, top_p, V, LEVELS)
                bins = bins_of(value, tl.load(bounds + 4), tl.load(bounds + 5), LEVELS)
                on_edge = kept & (bins == edge) & (value > float("-inf"))
                count = tl.sum(on_edge.to(tl.int32), axis=0)
                if count > 0:
                    place = tl.atomic_add(edge_counts_ptr + row, count) + tl.cumsum(on_edge.to(tl.int32), axis=0) - 1
                    tl.store(edge_ids_ptr + row * CAPACITY + place, token_id, mask=on_edge & (place < CAPACITY))
                kept = kept & (bins < edge)
        if is_drawn(words_ptr, row):
            value = (value - tl.load(bounds)) * coldness
            value += gumbel(noise_key(words_ptr, seq_lens_ptr, row), token_id)
        value = tl.where(kept, value, float("-inf"))
        best = tl.max(value, axis=0)
        tl.store(values_ptr + tl.program_id(0), best)
        tl.store(ids_ptr + tl.program_id(0), tl.min(tl.where(value == best, token_id, V), axis=0))


@triton.jit
def decide_kernel(
    tokens_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    listed_ptr: tl.tensor,
    edge_counts_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    marks_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    LEVELS: tl.constexpr,
    BOUNDS: tl.constexpr,
    LIST_SPAN: tl.constexpr,
    SPAN: tl.constexpr,
    SHIFT: tl.constexpr,
    FILTERED: tl.constexpr,
) -> None:
    """One program: a row's token, from the pieces, the candidates, or both, and its mark."""
    row = tl.program_id(0).to(tl.int64)
    if is_asking(words_ptr, tokens_ptr, row, False):
        coldness, top_k, top_p, log_min_p = filters_of(words_ptr, row, False)
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, False)
        slot = tl.load(words_ptr + row * _WORDS + _SLOT)
        in_pieces = True
        value = float("-inf")
        token_id = V
        if FILTERED:
            if is_filtered(top_k, top_p, log_min_p):
                bounds = bounds_ptr + row * BOUNDS
                exact = (slot < 0) & (tl.load(words_ptr + row * _WORDS + _BIAS_SLOT) < 0)
                how = (tl.load(bounds), coldness, tl.where(exact, SHIFT, 0))
                count = tl.load(counts_ptr + row)
                above = tl.zeros((), tl.int64)
                lowest, mass = tl.load(bounds + 1), tl.load(masses_ptr + row)
                in_pieces = count == _WIDE
                if in_pieces:
                    count = tl.load(edge_counts_ptr + row)
                    _, above = edge_of(weights_ptr + row * LEVELS, mass, top_k, top_p, V, LEVELS)
                key = noise_key(words_ptr, seq_lens_ptr, row)
                if count <= CAPACITY:
                    where = (listed_ptr + row * CAPACITY, count)
                    keep = (lowest, log_min_p, top_k, top_p, mass, above)
                    value, token_id = search_and_draw(source, where, how, keep, key, V, True, LIST_SPAN)
                else:  # more are equal, or nearly, than can be listed
                    keep = (lowest, log_min_p, top_k, top_p, mass, tl.zeros((), tl.int64))
                    value, token_id = search_and_draw(source, (listed_ptr, V), how, keep, key, V, False, SPAN)
        if in_pieces:
            piece = tl.arange(0, PIECES_PADDED)
            mask = piece < PIECES
            values = tl.load(values_ptr + row * PIECES + piece, mask=mask, other=float("-inf"))
            token_ids = tl.load(ids_ptr + row * PIECES + piece, mask=mask, other=V)
            best = tl.max(values, axis=0)
            best_id = tl.min(tl.where(values == best, token_ids, V), axis=0)
            better = (best > value) | ((best == value) & (best_id < token_id))
            token_id = tl.where(better, best_id, token_id)
        tl.store(tokens_ptr + row, tl.where(token_id < V, token_id, -1).to(tl.int64))
        if (slot >= 0) & (token_id < V):
            mark = source[1] + token_id
            tl.store(mark, tl.load(mark) + _OUTPUT)


def launch_sample_tokens(logits: torch.Tensor, rows: ChoiceRows, tokens: torch.Tensor) -> None:
    """See `workers.sampling.ops.sample_tokens`."""
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    found = find_candidates(logits, rows, tokens, raw=False, gather=rows.any_filtered)
    piece = min(_PIECE, triton.next_power_of_2(vocab_size))
    pieces = triton.cdiv(vocab_size, piece)
    values = torch.empty(num_rows * pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows * pieces, dtype=torch.int32, device=logits.device)
    batch = (logits, logits.stride(0), *rows.pointers)
    sizes = {"V": vocab_size, "CAPACITY": CAPACITY, "LEVELS": LEVELS, "BOUNDS": BOUNDS}
    with on_device(logits):
        draw_kernel[(num_rows * pieces,)](
            *(values, ids, found.token_ids, found.edge_counts, found.bounds, found.counts, found.masses),
            *(found.weights, *batch, tokens),
            PIECE=piece,
            FILTERED=rows.any_filtered,
            num_warps=4,
            **sizes,
        )
        decide_kernel[(num_rows,)](
            *(tokens, values, ids, found.bounds, found.counts, found.masses, found.token_ids),
            *(found.edge_counts, found.weights, *batch),
            PIECES=pieces,
            PIECES_PADDED=triton.next_power_of_2(pieces),
            LIST_SPAN=_LIST_SPAN,
            SPAN=_SPAN,
            SHIFT=_SHIFTS.get(logits.dtype, 0),
            FILTERED=rows.any_filtered,
            num_warps=_NUM_WARPS if rows.any_filtered else 1,
            **sizes,
        )
