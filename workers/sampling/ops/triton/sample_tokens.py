"""The kernels of `sample_tokens`: the best of each piece of the vocabulary, then one token for each row."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device
from workers.sampling.ops import penalties, row_params
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.triton.candidates import CAPACITY, find_candidates
from workers.sampling.ops.triton.rows import (
    filters_of,
    gumbel,
    is_asking,
    is_drawn,
    noise_key,
    row_scores,
    scores_of,
)
from workers.sampling.ops.triton.search import search_and_draw

_PIECE, _LIST_SPAN, _SPAN, _NUM_WARPS = 2048, 1024, 4096, 16
_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
"""Low bits of a score's order key that say nothing, where the scores are the logits."""
_WORDS, _SLOT = tl.constexpr(row_params.WORDS), tl.constexpr(row_params.SLOT)
_BIAS_SLOT = tl.constexpr(row_params.BIAS_SLOT)
_OUTPUT = tl.constexpr(penalties.OUTPUT)


@triton.jit
def draw_kernel(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
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
) -> None:
    """One program: the best of `PIECE` tokens of a row without filters, with noise unless the row is greedy."""
    PIECES: tl.constexpr = (V + PIECE - 1) // PIECE
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    coldness, top_k, top_p, log_min_p = filters_of(words_ptr, row, False)
    free = (top_k == 0) & (top_p >= 1.0) & (log_min_p == float("-inf"))
    if free & is_asking(words_ptr, tokens_ptr, row, False):
        token_id = tl.program_id(0) % PIECES * PIECE + tl.arange(0, PIECE)
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, False)
        value = scores_of(source, token_id, token_id < V)
        if is_drawn(words_ptr, row):
            value = (value - tl.load(bounds_ptr + row * 4)) * coldness
            value += gumbel(noise_key(words_ptr, seq_lens_ptr, row), token_id)
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
    LIST_SPAN: tl.constexpr,
    SPAN: tl.constexpr,
    SHIFT: tl.constexpr,
    FILTERED: tl.constexpr,
) -> None:
    """One program: a row's token, from the pieces or the candidates, and its mark."""
    row = tl.program_id(0).to(tl.int64)
    if is_asking(words_ptr, tokens_ptr, row, False):
        coldness, top_k, top_p, log_min_p = filters_of(words_ptr, row, False)
        source = row_scores(logits_ptr, stride, marks_ptr, bias_ptr, masks_ptr, words_ptr, seq_lens_ptr, row, V, False)
        slot = tl.load(words_ptr + row * _WORDS + _SLOT)
        if (top_k == 0) & (top_p >= 1.0) & (log_min_p == float("-inf")):
            piece = tl.arange(0, PIECES_PADDED)
            mask = piece < PIECES
            values = tl.load(values_ptr + row * PIECES + piece, mask=mask, other=float("-inf"))
            token_ids = tl.load(ids_ptr + row * PIECES + piece, mask=mask, other=V)
            token_id = tl.min(tl.where(values == tl.max(values, axis=0), token_ids, V), axis=0)
        else:
            token_id = V
            if FILTERED:
                count = tl.load(counts_ptr + row)
                largest = tl.load(bounds_ptr + row * 4)
                exact = (slot < 0) & (tl.load(words_ptr + row * _WORDS + _BIAS_SLOT) < 0)
                how = (largest, coldness, tl.where(exact, SHIFT, 0))
                keep = (tl.load(bounds_ptr + row * 4 + 1), log_min_p, top_k, top_p, tl.load(masses_ptr + row))
                key = noise_key(words_ptr, seq_lens_ptr, row)
                if count <= CAPACITY:
                    where = (listed_ptr + row * CAPACITY, count)
                    token_id = search_and_draw(source, where, how, keep, key, V, True, LIST_SPAN)
                else:
                    token_id = search_and_draw(source, (listed_ptr, V), how, keep, key, V, False, SPAN)
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
    with on_device(logits):
        if rows.any_unfiltered:
            draw_kernel[(num_rows * pieces,)](
                *(values, ids, found.bounds, *batch, tokens), V=vocab_size, PIECE=piece, num_warps=4
            )
        decide_kernel[(num_rows,)](
            *(tokens, values, ids, found.bounds, found.counts, found.masses, found.token_ids, *batch),
            V=vocab_size,
            PIECES=pieces,
            PIECES_PADDED=triton.next_power_of_2(pieces),
            CAPACITY=CAPACITY,
            LIST_SPAN=_LIST_SPAN,
            SPAN=_SPAN,
            SHIFT=_SHIFTS.get(logits.dtype, 0),
            FILTERED=rows.any_filtered,
            num_warps=_NUM_WARPS if rows.any_filtered else 1,
        )
