"""What a prefill of latent attention reads, in which pieces, and how much memory that takes: all of it is decided here.

New tokens attend to themselves over keys and values that are expanded from their own latents. What their sequences have
in the cache already (earlier chunks, a shared prefix) is expanded piece by piece in a workspace that is bounded,
whatever the length of the context, and each piece's attention is merged into the result by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.kv_cache import context_slots
from attention.metadata import CommonAttentionMetadata, cumulative_lens
from attention.spec import AttentionSpec, MLASpec

WORKSPACE_BYTES = 256 << 20
"""Of expanded keys and values at a time."""


@dataclass(frozen=True)
class Piece:
    """Cached tokens of one sequence.

    Attributes:
        sequence: its number among those of the prefill.
        begin: position of the first token.
        length: how many.
    """

    sequence: int
    begin: int
    length: int


@dataclass(frozen=True)
class ContextChunk:
    """Cached tokens that are expanded together: of sequences whose queries lie one behind the other.

    Attributes:
        queries: rows of the prefill's queries.
        cu_seqlens_q: (n + 1,) int32, of these queries.
        cu_seqlens_k: (n + 1,) int32, of the cached tokens.
        query_lens: of these sequences.
        key_lens: cached tokens of each.
        slots: (S,) int64, where they lie.
    """

    queries: slice
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    slots: torch.Tensor


@dataclass(frozen=True)
class PrefillPlan:
    """The sequences of a batch that are prefilled.

    Attributes:
        tokens: (Tp,) int64, their rows in T; None: all of T, in order.
        cu_seqlens: (P + 1,) int32, where each sequence's new tokens begin in Tp.
        lens: new tokens of each.
        slots: (Tp,) int64, where they are stored; a negative one is not.
        context: what is attended to beside them.
    """

    tokens: torch.Tensor | None
    cu_seqlens: torch.Tensor
    lens: tuple[int, ...]
    slots: torch.Tensor
    context: tuple[ContextChunk, ...]


def plan_prefill(
    common: CommonAttentionMetadata,
    sequences: Sequence[int],
    rows: np.ndarray | None,
    block_size: int,
    most_tokens: int,
) -> PrefillPlan:
    """Plan some sequences of a batch; waits for no device.

    Args:
        common: the batch.
        sequences: their numbers, ascending.
        rows: (Tp,) int64, their tokens' rows in T; None: all of T.
        block_size: tokens in a KV block.
        most_tokens: see `workspace_tokens`.
    """
    device = common.block_tables.device
    lens = tuple(common.query_lens[i] for i in sequences)
    prefixes = [common.context_lens[i] - n for i, n in zip(sequences, lens, strict=True)]
    tokens = None if rows is None else torch.from_numpy(rows).to(device)
    slots = common.slot_mapping if tokens is None else common.slot_mapping[tokens]
    cu_seqlens = common.cu_seqlens_q if tokens is None else cumulative_lens(lens, device)
    pieces = [list(chunk) for chunk in cut_context(prefixes, most_tokens)]
    begins = np.concatenate(([0], np.cumsum(lens)))
    chunks = tuple(_chunk(common, sequences, lens, begins, chunk, block_size) for chunk in pieces)
    return PrefillPlan(tokens, cu_seqlens, lens, slots, chunks)


def cut_context(lens: Sequence[int], most_tokens: int) -> Iterable[list[Piece]]:
    """Cut what sequences have in the cache into chunks of at most `most_tokens`, of neighbours each.

    A sequence without any ends a chunk: the queries of a chunk lie one behind the other, and each sees a key of it.

    Args:
        lens: cached tokens of each sequence.
        most_tokens: positive.
    """
    chunk: list[Piece] = []
    room = most_tokens
    for sequence, length in enumerate(lens):
        begin = 0
        while begin < length:
            taken = min(room, length - begin)
            chunk.append(Piece(sequence, begin, taken))
            begin, room = begin + taken, room - taken
            if not room:
                yield chunk
                chunk, room = [], most_tokens
        if not length and chunk:
            yield chunk
            chunk, room = [], most_tokens
    if chunk:
        yield chunk


def workspace_tokens(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Cached tokens that may be expanded at a time: keys, values, and keys once more joined with their rotary part."""
    mla = spec.mla
    assert mla is not None
    return max(1, WORKSPACE_BYTES // (spec.num_heads * expanded_size(mla) * dtype.itemsize))


def expanded_size(mla: MLASpec) -> int:
    """Numbers that a token takes in each head while it is attended to."""
    return 2 * mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim


def _chunk(
    common: CommonAttentionMetadata,
    sequences: Sequence[int],
    lens: tuple[int, ...],
    begins: np.ndarray,
    pieces: Sequence[Piece],
    block_size: int,
) -> ContextChunk:
    device = common.block_tables.device
    first, last = pieces[0].sequence, pieces[-1].sequence
    query_lens, key_lens = lens[first : last + 1], tuple(piece.length for piece in pieces)
    rows = [sequences[piece.sequence] for piece in pieces]
    slots = context_slots(common.block_tables, rows, [piece.begin for piece in pieces], key_lens, block_size)
    return ContextChunk(
        slice(int(begins[first]), int(begins[last + 1])),
        cumulative_lens(query_lens, device),
        cumulative_lens(key_lens, device),
        query_lens,
        key_lens,
        slots,
    )
