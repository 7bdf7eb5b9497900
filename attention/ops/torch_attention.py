"""Attention over the paged cache in plain torch, tile by tile: the twin of the Triton kernels, for any device.

Float32 inside, whatever the tensors are. At most `TILE` keys of a few sequences are gathered at a time, never a whole
context. Only slots that hold a token are read: the others may hold anything, and a weight of zero does not tame a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attention.backend import KVScales
from attention.fp8 import dequantize
from attention.kv_cache import key_rows, take_rows, token_rows
from attention.ops.merge_attn_states import apply_sinks, merge_states
from attention.spec import FP8

TILE = 512
"""Keys that are attended to at a time; a partition of V2 decode."""

_QUERY_TILE = 128
_GROUP_BYTES = 8 << 20


@dataclass(frozen=True)
class Scores:
    """How a query scores the keys; see `AttentionSpec` for the formula.

    Attributes:
        scale: multiplies q·k.
        causal: whether a query is kept from the keys behind it.
        sliding_window: a query sees keys nearer than this; None: all.
        soft_cap: bounds the scores; None: does not.
        alibi_slopes: (Hq,) float32, or None.
    """

    scale: float
    causal: bool = True
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_pos: torch.Tensor,
    key_pos: torch.Tensor,
    scores: Scores,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of N sequences alike in shape, over some of their keys.

    Args:
        query: (N, M, Hq, D).
        key: (N, K, Hkv, D).
        value: (N, K, Hkv, D); finite, also where no query sees it.
        query_pos: (N, M) int64, positions in the sequences.
        key_pos: (N, K) int64; a negative one is seen by no query.
        scores: how they are scored.
        mask: bool, of a shape that broadcasts to (N, M, K), True where a query sees a key: instead of the causal rule.

    Returns:
        (N, M, Hq, D) float32 and the logarithms of the softmaxes' denominators, (N, M, Hq) float32: zeros and -inf
        where no key is seen.
    """
    num_kv_heads = key.shape[2]
    q = query.float().unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (N, Hkv, G, M, D)
    logits = (q.flatten(2, 3) @ key.float().permute(0, 2, 3, 1)).mul_(scores.scale).unflatten(2, q.shape[2:4])
    if scores.soft_cap is not None:
        logits = logits.div_(scores.soft_cap).tanh_().mul_(scores.soft_cap)
    distance = query_pos[:, :, None] - key_pos[:, None, :]
    if scores.alibi_slopes is not None:
        slopes = scores.alibi_slopes.float().view(num_kv_heads, -1, 1, 1)
        logits -= slopes * distance.abs()[:, None, None]
    visible = _visible(distance, scores, mask) & (key_pos >= 0)[:, None, :]
    logits.masked_fill_(~visible[:, None, None], float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    weights = logits.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
    attended = (weights.flatten(2, 3) @ value.float().transpose(1, 2)).unflatten(2, q.shape[2:4])
    return attended.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.squeeze(-1).permute(0, 3, 1, 2).flatten(2, 3)


def _visible(distance: torch.Tensor, scores: Scores, mask: torch.Tensor | None) -> torch.Tensor:
    causal = scores.causal and mask is None
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if scores.sliding_window is not None:
        visible = visible & ((distance if causal else distance.abs()) < scores.sliding_window)
    return visible


def gather(
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some slots.

    Args:
        kv_cache: (num_blocks, 2, block_size, Hkv, D).
        slots: int64, any shape, `block * block_size + offset`.
        scales: of an FP8 cache.

    Returns:
        (*slots.shape, Hkv, D) twice: float32 of an FP8 cache, else of the cache's dtype.
    """
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    cache = token_rows(kv_cache)
    rows = key_rows(slots.flatten(), block_size)
    found = []
    for half, scale in ((rows, scales.k), (rows + block_size, scales.v)):
        tokens = take_rows(cache, half)
        tokens = dequantize(tokens, scale) if tokens.dtype == FP8 else tokens
        found.append(tokens.view(*slots.shape, num_kv_heads, head_size))
    return found[0], found[1]


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    scores: Scores,
    *,
    sinks: torch.Tensor | None = None,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
    lse: torch.Tensor | None = None,
    partitioned: bool = False,
) -> None:
    """One query for each sequence, its last token. Sequences of similar length attend together.

    Args:
        query: (B, Hq, D).
        kv_cache: (num_blocks, 2, block_size, Hkv, D).
        block_tables: (B, max_blocks) int32.
        seq_lens: (B,) int32.
        output: (B, Hq, D), written.
        scores: how keys are scored.
        sinks: (Hq,) float32, or None.
        scales: of an FP8 cache.
        lse: (B, Hq) float32, written when given, sinks included.
        partitioned: whether all tiles of keys are kept and merged at the end (V2), instead of one after the other into
            one state (V1).
    """
    order = seq_lens.argsort(descending=True, stable=True)
    per_sequence = 2 * TILE * kv_cache.shape[3] * kv_cache.shape[4] * 4
    for group in order.split(max(1, _GROUP_BYTES // per_sequence)):
        tiles = _decode_tiles(query[group], kv_cache, block_tables[group], seq_lens[group].long(), scores, scales)
        state = _merge_tiles(tiles, (len(group), *query.shape[1:]), query.device, partitioned)
        _write(state, output, lse, group, sinks)


def _decode_tiles(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    tables: torch.Tensor,
    lens: torch.Tensor,
    scores: Scores,
    scales: KVScales,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(sequences, their outputs, their lse) of each tile of keys; the sequences are sorted, longest first."""
    known = lens.tolist()
    block_size = kv_cache.shape[2]
    shortest = next((n for n in reversed(known) if n), 0)
    first = max(0, shortest - scores.sliding_window) // TILE if scores.sliding_window else 0
    for start in range(first * TILE, known[0], TILE):
        count = sum(n > start for n in known)
        position = torch.arange(start, min(start + TILE, known[0]), device=lens.device).expand(count, -1)
        last = lens[:count, None] - 1
        inside = position.minimum(last)
        blocks = tables[:count].gather(1, inside // block_size).long()
        key, value = gather(kv_cache, blocks * block_size + inside % block_size, scales)
        key_pos = position.masked_fill(position > last, -1)
        attended, lse = attend(query[:count, None], key, value, last, key_pos, scores)
        yield count, attended[:, 0], lse[:, 0]


def _merge_tiles(
    tiles: Iterator[tuple[int, torch.Tensor, torch.Tensor]],
    shape: tuple[int, ...],
    device: torch.device,
    partitioned: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge tiles into (rows, Hq, D) and (rows, Hq); a tile is of the first rows."""
    output = torch.zeros(shape, device=device)
    lse = torch.full(shape[:-1], float("-inf"), device=device)
    if partitioned:
        kept = [(output, lse)]
        for count, attended, tile_lse in tiles:
            padding = (0, 0) * (len(shape) - 2) + (0, shape[0] - count)
            kept.append(
                (
                    torch.nn.functional.pad(attended, (0, 0, *padding)),
                    torch.nn.functional.pad(tile_lse, padding, value=float("-inf")),
                )
            )
        return merge_states(torch.stack([o for o, _ in kept]), torch.stack([one for _, one in kept]))
    for count, attended, tile_lse in tiles:
        states = torch.stack((output[:count], attended)), torch.stack((lse[:count], tile_lse))
        output[:count], lse[:count] = merge_states(*states)
    return output, lse


def paged_prefix(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    output: torch.Tensor,
    scores: Scores,
    *,
    sinks: torch.Tensor | None = None,
    scales: KVScales = KVScales(),  # noqa: B008 (frozen)
    lse: torch.Tensor | None = None,
    before_queries: bool = False,
) -> None:
    """The last tokens of each sequence as queries, over all of it.

    Args:
        query: (T, Hq, D).
        kv_cache: (num_blocks, 2, block_size, Hkv, D).
        cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
        seq_lens: (B,) int32, keys of each sequence, those of the queries included.
        block_tables: (B, max_blocks) int32.
        output: (T, Hq, D), written.
        scores: how keys are scored.
        sinks: (Hq,) float32, or None.
        scales: of an FP8 cache.
        lse: (T, Hq) float32, written when given, sinks included.
        before_queries: whether the keys of the queries themselves are left out.
    """
    begins = cu_seqlens_q.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        begin, end = begins[i], begins[i + 1]
        num_keys = seq_len - (end - begin) if before_queries else seq_len
        for row in range(begin, end, _QUERY_TILE):
            rows = slice(row, min(row + _QUERY_TILE, end))
            first = seq_len - end + row
            tiles = _prefix_tiles(query[rows], first, kv_cache, block_tables[i], num_keys, scores, scales)
            state = _merge_tiles(tiles, query[rows].shape, query.device, False)
            _write(state, output, lse, rows, sinks)


def _prefix_tiles(
    query: torch.Tensor,
    first: int,
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    num_keys: int,
    scores: Scores,
    scales: KVScales,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(queries, their outputs, their lse) of each tile of one sequence's keys that they see.

    `first` is the position of the first query.
    """
    block_size = kv_cache.shape[2]
    last = first + len(query) - 1
    query_pos = torch.arange(first, last + 1, device=query.device)
    begin, end = 0, min(num_keys, last + 1) if scores.causal else num_keys
    if scores.sliding_window is not None:
        begin = max(0, first - scores.sliding_window + 1)
        end = min(end, last + scores.sliding_window)
    for start in range(begin, end, TILE):
        position = torch.arange(start, min(start + TILE, end), device=query.device)
        slots = table[position // block_size].long() * block_size + position % block_size
        key, value = gather(kv_cache, slots, scales)
        attended, lse = attend(query[None], key[None], value[None], query_pos[None], position[None], scores)
        yield len(query), attended[0], lse[0]


def _write(
    state: tuple[torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    lse: torch.Tensor | None,
    rows: torch.Tensor | slice,
    sinks: torch.Tensor | None,
) -> None:
    attended, denominators = state if sinks is None else apply_sinks(*state, sinks)
    output[rows] = attended.to(output.dtype)
    if lse is not None:
        lse[rows] = denominators
