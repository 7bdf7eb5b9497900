"""Running a planned batch: keys are fetched piece by piece, tiles attend, and what they give is put together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attention.backends.common.batch_split import token_slots
from attention.backends.torch_sdpa.kernels import Kernel, State
from attention.backends.torch_sdpa.plan import Piece, SdpaMetadata, Work
from attention.backends.torch_sdpa.workspace import Landing
from attention.kv_cache import key_rows
from attention.metadata import CommonAttentionMetadata
from attention.spec import FP8

Finish = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""What is done to a query's output, (N, Hq, D), and its denominator, (N, Hq), once it has seen all keys."""


class Keys:
    """Where a layer's keys and values are.

    Args:
        key: (Tk, Hkv, D) of the batch; None: all are in the cache.
        value: (Tk, Hkv, D), or None with `key`.
        kv_cache: the layer's, this batch's tokens included; None: there are only the batch's own.
        common: the batch, whose block tables say where its own tokens lie in the cache.
    """

    __slots__ = ("_common", "_key", "_kv_cache", "_value")

    def __init__(
        self,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        common: CommonAttentionMetadata,
    ) -> None:
        self._key = key
        self._value = value
        self._kv_cache = kv_cache
        self._common = common

    def of_group(self, piece: Piece, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `count` sequences, (N, Hkv, K, D) each, out of the cache."""
        assert piece.rows is not None
        return self._gather(piece.rows, piece.landing, count, dtype)

    def of_sequence(self, piece: Piece, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, (K, Hkv, D) each; copied only where they are not the batch's own."""
        if piece.rows is None and self._key is not None and self._value is not None:
            return self._key[piece.own], self._value[piece.own]
        rows = self._own_rows(piece) if piece.rows is None else piece.rows
        keys, values = self._gather(rows, piece.landing, 1, dtype)
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def _own_rows(self, piece: Piece) -> torch.Tensor:
        assert self._kv_cache is not None
        block_size = self._kv_cache.shape[2]
        keys = key_rows(token_slots(self._common, block_size)[piece.own], block_size)
        return torch.cat((keys, keys + block_size))

    def _gather(
        self, rows: torch.Tensor, landing: Landing | None, count: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, Hkv, K, D) each; those of an FP8 cache in `dtype`, not scaled: that loses nothing."""
        assert self._kv_cache is not None
        *_, heads, size = self._kv_cache.shape
        cache = self._kv_cache.view(-1, heads * size)
        fp8 = cache.dtype == FP8
        if fp8:  # indexing knows no FP8
            cache = cache.view(torch.uint8)
        if landing is not None:
            torch.index_select(cache, 0, rows, out=landing.raw)
            if fp8:
                landing.dense.copy_(landing.raw.view(FP8))
            return landing.key, landing.value
        gathered = cache.index_select(0, rows)
        if fp8:
            gathered = gathered.view(FP8).to(dtype)
        keys, values = gathered.view(2, count, -1, heads, size).transpose(2, 3).unbind(0)
        return keys, values


def run(
    plan: SdpaMetadata,
    query: torch.Tensor,
    keys: Keys,
    kernel: Kernel,
    finish: Finish | None,
    output: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with all queries, (T, Hq, D), and return `output`, which is made where it is not given."""
    works = plan.works
    if output is None:
        if len(works) == 1 and works[0].tokens is None:
            attended = _one_each(works[0], query, keys, kernel, finish)
            return attended if attended.dtype == query.dtype else attended.to(query.dtype)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for work in works:
        if work.tokens is None:
            output.copy_(_one_each(work, query, keys, kernel, finish))
        elif work.one_each:
            attended = _one_each(work, query[work.tokens], keys, kernel, finish)
            output[work.tokens] = attended.to(output.dtype)
        else:
            _sequence(work, query[work.tokens], keys, kernel, finish, output[work.tokens])
    return output


def _one_each(work: Work, query: torch.Tensor, keys: Keys, kernel: Kernel, finish: Finish | None) -> torch.Tensor:
    """Sequences that bring one token each: every piece has one tile, of all that it holds."""
    count, dtype = work.size, query.dtype
    states = [kernel.one_each(query, *keys.of_group(piece, count, dtype), piece.tiles[0]) for piece in work.pieces]
    attended, lse = states[0] if len(states) == 1 else _merged(states)
    return attended if finish is None else finish(attended, lse)


def _merged(states: list[State]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what several pieces gave, none of which was without a visible key, by log-sum-exp."""
    lses = torch.stack([lse for _, lse in states if lse is not None])
    attended = torch.stack([attended for attended, _ in states])
    return (attended * lses.softmax(0).unsqueeze(-1)).sum(0), lses.logsumexp(0)


def _sequence(
    work: Work, query: torch.Tensor, keys: Keys, kernel: Kernel, finish: Finish | None, output: torch.Tensor
) -> None:
    """One sequence, its queries and `output` (n, Hq, D)."""
    merging = len(work.pieces) != 1
    if merging:
        total = torch.zeros(query.shape, device=query.device)
        denominator = torch.full(query.shape[:-1], float("-inf"), device=query.device)
    for piece in work.pieces:
        key, value = keys.of_sequence(piece, query.dtype)
        for tile in piece.tiles:
            rows, seen = slice(tile.q_begin, tile.q_end), slice(tile.k_begin, tile.k_end)
            attended, lse = kernel.sequence(query[rows], key[seen], value[seen], tile)
            if not merging:
                output[rows] = attended if finish is None else finish(attended, lse)
            elif lse is not None:
                _accumulate(total[rows], denominator[rows], attended, lse)
    if merging:
        output.copy_(total if finish is None else finish(total, denominator))


def _accumulate(total: torch.Tensor, denominator: torch.Tensor, attended: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge a state into another in place, by log-sum-exp; one that saw no key changes nothing."""
    merged = torch.logaddexp(denominator, lse)
    known = merged.clamp(min=torch.finfo(merged.dtype).min)  # -inf of both would be NaN
    total.mul_((denominator - known).exp_().unsqueeze(-1))
    total.add_(attended * (lse - known).exp_().unsqueeze(-1))
    denominator.copy_(merged)
