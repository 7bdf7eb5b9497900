"""The kernel of `top_logprobs`: takes the most likely of a row's candidates, one after the other."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device
from workers.sampling.ops import row_params
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.logprob_types import TopLogprobs
from workers.sampling.ops.triton.candidates import BOUNDS, CAPACITY, find_candidates
from workers.sampling.ops.triton.rows import is_asking

_SPAN, _NUM_WARPS = 1024, 8
_WORDS, _LOGPROBS = tl.constexpr(row_params.WORDS), tl.constexpr(row_params.LOGPROBS)


@triton.jit(do_not_specialize=["most"])
def top_logprobs_kernel(
    chosen_ptr: tl.tensor,
    top_ids_ptr: tl.tensor,
    top_values_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    listed_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    words_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    most: tl.tensor,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
    BOUNDS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """One program: a row's log-probabilities, of the chosen token and of the `most` likeliest or as many as wanted."""
    row = tl.program_id(0).to(tl.int64)
    if is_asking(words_ptr, tokens_ptr, row, True):
        logits = logits_ptr + row * stride
        norm = tl.load(bounds_ptr + row * BOUNDS) + tl.load(bounds_ptr + row * BOUNDS + 3)
        tl.store(chosen_ptr + row, tl.load(logits + tl.load(tokens_ptr + row)).to(tl.float32) - norm)
        wanted = tl.minimum(tl.load(words_ptr + row * _WORDS + _LOGPROBS), most)
        listed = False
        count = V
        if wanted > 0:  # else nothing is listed, nor counted
            number = tl.load(counts_ptr + row)
            listed = number <= CAPACITY
            count = tl.where(listed, number, V)
        last = float("inf")
        last_id = -1
        place = 0
        while place < wanted:
            best = float("-inf")
            best_id = V
            begin = 0
            while begin < count:
                token_id = begin + tl.arange(0, SPAN)
                mask = token_id < count
                if listed:
                    token_id = tl.load(listed_ptr + row * CAPACITY + token_id, mask=mask, other=0)
                value = tl.load(logits + token_id, mask=mask, other=float("-inf")).to(tl.float32)
                left = mask & ((value < last) | ((value == last) & (token_id > last_id)))
                here = tl.max(tl.where(left, value, float("-inf")), axis=0)
                here_id = tl.min(tl.where(left & (value == here), token_id, V), axis=0)
                if (here > best) | ((here == best) & (here_id < best_id)):
                    best = here
                    best_id = here_id
                begin += SPAN
            tl.store(top_ids_ptr + row * most + place, best_id.to(tl.int64))
            tl.store(top_values_ptr + row * most + place, best - norm)
            last = best
            last_id = best_id
            place += 1


def launch_top_logprobs(logits: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, most: int) -> TopLogprobs:
    """See `workers.sampling.ops.top_logprobs`."""
    num_rows, vocab_size = logits.shape
    device = logits.device
    result = TopLogprobs(
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, most, dtype=torch.int64, device=device),
        torch.empty(num_rows, most, dtype=torch.float32, device=device),
    )
    if num_rows == 0:
        return result
    # The logits as they are: neither lengths nor marks are looked at.
    rows = ChoiceRows(words, words, words)
    found = find_candidates(logits, rows, tokens, raw=True, gather=most > 0)
    with on_device(logits):
        top_logprobs_kernel[(num_rows,)](
            *(*result, found.bounds, found.counts, found.token_ids, logits, logits.stride(0), words, tokens, most),
            V=vocab_size,
            CAPACITY=CAPACITY,
            BOUNDS=BOUNDS,
            SPAN=min(_SPAN, triton.next_power_of_2(vocab_size)),
            num_warps=_NUM_WARPS,
        )
    return result
