"""The kernels of `greedy_sample`: the best of each piece of the vocabulary, then the best of the pieces."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device

_PIECE, _NUM_WARPS = 4096, 4


@triton.jit
def best_of_pieces_kernel(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    stride_row: tl.tensor,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: the largest of `PIECE` logits of a row and its lowest id; NaN counts as plus infinity."""
    PIECES: tl.constexpr = (V + PIECE - 1) // PIECE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    row = (program // PIECES).to(tl.int64)
    token_id = program % PIECES * PIECE + tl.arange(0, PIECE)
    logits = tl.load(logits_ptr + row * stride_row + token_id, mask=token_id < V, other=float("-inf"))
    logits = logits.to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)
    best = tl.max(logits, axis=0)
    tl.store(values_ptr + program, best)
    tl.store(ids_ptr + program, tl.min(tl.where(logits == best, token_id, V), axis=0))


@triton.jit
def best_of_rows_kernel(
    out_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_PADDED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: a row's token from its pieces, -1 where the largest logit is not finite."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES_PADDED)
    values = tl.load(values_ptr + row * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    token_ids = tl.load(ids_ptr + row * PIECES + piece, mask=piece < PIECES, other=V)
    best = tl.max(values, axis=0)
    token_id = tl.min(tl.where(values == best, token_ids, V), axis=0)
    finite = (best < float("inf")) & (best > float("-inf"))
    tl.store(out_ptr + row, tl.where(finite, token_id, -1).to(tl.int64))


def launch_greedy_sample(logits: torch.Tensor, out: torch.Tensor) -> None:
    """The token of each row into `out`; see `workers.sampling.ops.greedy` for the arguments."""
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    piece = min(_PIECE, triton.next_power_of_2(vocab_size))
    pieces = triton.cdiv(vocab_size, piece)
    values = torch.empty(num_rows * pieces, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(num_rows * pieces, dtype=torch.int32, device=logits.device)
    with on_device(logits):
        best_of_pieces_kernel[(num_rows * pieces,)](
            values,
            token_ids,
            logits,
            logits.stride(0),
            V=vocab_size,
            PIECE=piece,
            num_warps=_NUM_WARPS,
            **dependent_launch(logits.device, num_rows * pieces),
        )
        best_of_rows_kernel[(num_rows,)](
            out,
            values,
            token_ids,
            V=vocab_size,
            PIECES=pieces,
            PIECES_PADDED=triton.next_power_of_2(pieces),
            num_warps=1,
            **dependent_launch(logits.device, num_rows),
        )
