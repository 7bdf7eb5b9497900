"""The decode kernel whose programs stay: each takes one piece of a sequence and KV head after the other, on Hopper.

A short piece is read faster than a program starts, finds its keys and ends; so here a program loads the next piece's
first keys while it computes the last ones of this. Its four warps have a quarter of a tile's keys each, with a softmax
and an output of their own, which are put together at the end of a piece: until then no warp waits for what another
computes. Matrix instructions are those of one warp (`mma.sync`): of 16 rows, the query heads of one KV head. Written in
Gluon. Putting partial softmaxes together is the same that splits need (Dao et al. 2023, "Flash-Decoding").
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.gluon_tiles import LN_2, LOG2_E, LOWEST, places_of

ROWS = gl.constexpr(16)
KEYS = gl.constexpr(64)
"""Of a tile, which lies in one block."""
_WARPS = gl.constexpr(4)
_OWN_KEYS = gl.constexpr(16)
_EIGHT = gl.constexpr(8)
"""Rows that a thread's registers have one of."""
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Triton 3.7 has another name for it than 3.6."""


@gluon.jit
def _add(a: gl.tensor, b: gl.tensor) -> gl.tensor:
    return a + b


@gluon.jit
def _pieces(
    seq_lens_ptr: gl.tensor,
    batch: gl.tensor,
    num_splits: gl.tensor,
    wanted_splits: gl.tensor,
    most_tiles: gl.tensor,
    BATCH_PADDED: gl.constexpr,
    MIN_TILES: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Of every sequence: its number, its length, tiles of a split as `decode_kernel.split_range` deals them, and how
    many splits there are up to its last; every sequence has one at least. Every warp has all of them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([max(1, BATCH_PADDED // 32)], [32], [_WARPS], [0])
    seq = gl.arange(0, BATCH_PADDED, LAYOUT)
    length = gl.load(seq_lens_ptr + seq, mask=seq < batch, other=0)
    tiles = (length + (KEYS - 1)) // KEYS
    tiles_per_split = gl.minimum((tiles + wanted_splits - 1) // wanted_splits, most_tiles)
    tiles_per_split = gl.maximum(tiles_per_split, (tiles + num_splits - 1) // num_splits)
    tiles_per_split = gl.maximum(tiles_per_split, MIN_TILES)
    used = gl.where(seq < batch, gl.maximum((tiles + tiles_per_split - 1) // tiles_per_split, 1), 0)
    return seq, length, tiles_per_split, gl.associative_scan(used, 0, _add)


@gluon.jit
def _piece(
    number: gl.tensor, seq: gl.tensor, length: gl.tensor, tiles_per_split: gl.tensor, upto: gl.tensor
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """(Sequence, split, first key, end, how many pieces the sequence has) of the n-th piece."""
    before = upto <= number
    own = gl.sum(before.to(gl.int32), 0)
    split = number - gl.max(gl.where(before, upto, 0), 0)
    mine = seq == own
    keys = gl.sum(gl.where(mine, length, 0), 0)
    size = gl.sum(gl.where(mine, tiles_per_split, 0), 0) * KEYS
    begin = split * size
    return own, split, begin, gl.minimum(begin + size, keys), gl.maximum((keys + size - 1) // size, 1)


@gluon.jit
def _copy_tile(
    target: gl.shared_memory_descriptor, ptr: gl.tensor, stride: gl.tensor, num_valid: gl.tensor, D: gl.constexpr
) -> None:
    """Send for `KEYS` rows; zeros come for those that there are not."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // D, D // 8], [_WARPS, 1, 1], [2, 1, 0])
    warp, key, column = places_of(_WARPS, _OWN_KEYS, D, LAYOUT)
    key = warp * _OWN_KEYS + key
    async_copy.async_copy_global_to_shared(target, ptr + key * stride + column, mask=key < num_valid)


@gluon.jit
def _load_queries(
    ptr: gl.tensor, stride: gl.tensor, GROUP: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
) -> gl.tensor:
    """Queries (4, 16, D), the same for every warp; zeros for heads that there are not."""
    warp, head, column = places_of(_WARPS, ROWS, D, LAYOUT)
    return gl.load(ptr + head * stride + column + warp * 0, mask=head < GROUP, other=0.0)


@gluon.jit
def _rows_of(values: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """The first and the last eight rows of (4, 16) values."""
    few, more = gl.split(values.reshape([_WARPS, 2, _EIGHT]).permute(0, 2, 1))
    return few, more


@gluon.jit
def _finish(
    largest: gl.tensor,
    total: gl.tensor,
    acc: gl.tensor,
    scale: gl.tensor,
    parts: gl.shared_memory_descriptor,
    largest_parts: gl.shared_memory_descriptor,
    total_parts: gl.shared_memory_descriptor,
    ptr: gl.tensor,
    stride: gl.tensor,
    lse_ptr: gl.tensor | None,
    lse_offset: gl.tensor,
    stride_lse: gl.tensor,
    lse_unit: gl.tensor,
    NUM_ROWS: gl.constexpr,
    D: gl.constexpr,
) -> None:
    """Put together what the warps have of eight rows, each by how its largest score compares, and write it."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SliceLayout(2, OUT)
    parts.store(acc)
    largest_parts.store(largest)
    total_parts.store(total)
    most = largest_parts.slice(0, 1, 0).load(ROW)
    for warp in gl.static_range(1, _WARPS):
        most = gl.maximum(most, largest_parts.slice(warp, 1, 0).load(ROW))
    divisor = gl.zeros([1, _EIGHT], gl.float32, ROW)
    merged = gl.zeros([1, _EIGHT, D], gl.float32, OUT)
    for warp in gl.static_range(_WARPS):
        share = gl.exp2(largest_parts.slice(warp, 1, 0).load(ROW) - most)
        divisor += share * total_parts.slice(warp, 1, 0).load(ROW)
        merged += share[:, :, None] * parts.slice(warp, 1, 0).load(OUT)
    empty = divisor == 0.0
    divisor = gl.where(empty, 1.0, divisor)
    merged = merged * (scale / divisor)[:, :, None]
    row = gl.arange(0, _EIGHT, gl.SliceLayout(0, ROW))[None, :]
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, :][:, None, :]
    ptrs = ptr + (row * stride)[:, :, None] + column
    gl.store(ptrs, merged.to(ptr.dtype.element_ty), mask=(row < NUM_ROWS)[:, :, None])
    if lse_ptr is not None:
        lse = gl.where(empty, float("-inf"), (most + gl.log2(divisor)) * lse_unit)
        gl.store(lse_ptr + lse_offset + row * stride_lse, lse, mask=row < NUM_ROWS)


@gluon.jit
def _merge(
    partial_ptr: gl.tensor,
    partial_lse_ptr: gl.tensor,
    slot: gl.tensor,
    num_splits: gl.tensor,
    num_pieces: gl.tensor,
    ptr: gl.tensor,
    stride: gl.tensor,
    lse_ptr: gl.tensor | None,
    lse_offset: gl.tensor,
    stride_lse: gl.tensor,
    NUM_ROWS: gl.constexpr,
    D: gl.constexpr,
) -> None:
    """Put together the pieces of a sequence for eight rows, of which `slot` is the first one's first place."""
    PIECES: gl.constexpr = 4
    OUT: gl.constexpr = gl.BlockedLayout([PIECES, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SliceLayout(2, OUT)
    number = gl.arange(0, PIECES, gl.SliceLayout(1, ROW))[:, None]
    row = gl.arange(0, _EIGHT, gl.SliceLayout(0, ROW))[None, :]
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, :][:, None, :]
    most = gl.full([_EIGHT], LOWEST, gl.float32, gl.SliceLayout(0, ROW))
    divisor = gl.zeros([_EIGHT], gl.float32, gl.SliceLayout(0, ROW))
    merged = gl.zeros([_EIGHT, D], gl.float32, gl.SliceLayout(0, OUT))
    for first in range(0, num_pieces, PIECES):
        place = slot + row * num_splits + first + number
        mask = (first + number < num_pieces) & (row < NUM_ROWS)
        lses = gl.load(partial_lse_ptr + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
        parts = gl.load(
            partial_ptr + (place * D)[:, :, None] + column, mask=mask[:, :, None], other=0.0, cache_modifier=".cg"
        )
        now = gl.maximum(most, gl.max(lses, 0))
        rescale = gl.exp2(most - now)
        weights = gl.exp2(lses - now[None, :])
        most = now
        divisor = divisor * rescale + gl.sum(weights, 0)
        rescale = gl.convert_layout(rescale, gl.SliceLayout(1, gl.SliceLayout(0, OUT)))[:, None]
        merged = merged * rescale + gl.sum(parts * weights[:, :, None], 0)
    empty = divisor == 0.0
    divisor = gl.where(empty, 1.0, divisor)
    merged = merged / gl.convert_layout(divisor, gl.SliceLayout(1, gl.SliceLayout(0, OUT)))[:, None]
    row = gl.arange(0, _EIGHT, gl.SliceLayout(1, gl.SliceLayout(0, OUT)))[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, OUT)))[None, :]
    gl.store(ptr + row * stride + column, merged.to(ptr.dtype.element_ty), mask=row < NUM_ROWS)
    if lse_ptr is not None:
        row = gl.arange(0, _EIGHT, gl.SliceLayout(0, ROW))
        lse = gl.where(empty, float("-inf"), (most + gl.log2(divisor)) * LN_2)
        gl.store(lse_ptr + lse_offset + row * stride_lse, lse, mask=row < NUM_ROWS)


@gluon.jit(do_not_specialize=["batch", "stride_table", "num_splits", "wanted_splits", "most_tiles"])
def staying_decode_kernel(
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    partial_lse_ptr: gl.tensor,
    counters_ptr: gl.tensor,
    q_ptr: gl.tensor,
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    table_ptr: gl.tensor,
    seq_lens_ptr: gl.tensor,
    batch: gl.tensor,
    scale: gl.tensor,
    v_scale: gl.tensor,
    num_splits: gl.tensor,
    wanted_splits: gl.tensor,
    most_tiles: gl.tensor,
    stride_qt: gl.tensor,
    stride_qh: gl.tensor,
    stride_ot: gl.tensor,
    stride_oh: gl.tensor,
    stride_lt: gl.tensor,
    stride_lh: gl.tensor,
    stride_table: gl.tensor,
    stride_block: gl.tensor,
    stride_kn: gl.tensor,
    stride_kh: gl.tensor,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BATCH_PADDED: gl.constexpr,
    STAGES: gl.constexpr,
    MIN_TILES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """One program: every n-th piece, n programs being launched.

    A sequence of one piece has its output written. Of several, the program that ends the last one puts them together:
    `counters_ptr` (B * Hkv,) int32 says how many have ended, and is all zero before and afterwards. What else is given
    is as of `decode_kernel.decode_kernel`; `BATCH_PADDED` is a power of two.
    """
    KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    FEW: gl.constexpr = GROUP if GROUP < 8 else 8
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [_WARPS, 1, 1], [1, 16, 8])
    QUERY: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    KEY: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(2, MMA)
    TILE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq, length, tiles_per_split, upto = _pieces(
        seq_lens_ptr, batch, num_splits, wanted_splits, most_tiles, BATCH_PADDED, MIN_TILES
    )
    num_items = gl.max(upto, 0) * KV_HEADS
    programs = gl.num_programs(0)
    item = gl.program_id(0)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, _WARPS, _OWN_KEYS, D], TILE)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, _WARPS, _OWN_KEYS, D], TILE)
    # Neighbours in a row are those of four threads: rows of eight threads are shifted against each other.
    parts = gl.allocate_shared_memory(gl.float32, [_WARPS, _EIGHT, D], TILE)
    largest_parts = gl.allocate_shared_memory(gl.float32, [_WARPS, _EIGHT], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    total_parts = gl.allocate_shared_memory(gl.float32, [_WARPS, _EIGHT], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    # The tile that is sent for next: of which piece, from which key on, up to which.
    ahead_item = item - programs
    ahead_seq = item * 0
    ahead = 0
    ahead_end = 0
    sent = 0
    used = 0
    factor = scale * LOG2_E
    while item < num_items:
        own, split, begin, end, num_pieces = _piece(item // KV_HEADS, seq, length, tiles_per_split, upto)
        kv_head = item % KV_HEADS
        own = own.to(gl.int64)
        queries = q_ptr + own * stride_qt + kv_head * GROUP * stride_qh
        q = _load_queries(queries, stride_qh, GROUP, D, QUERY)
        largest = gl.full([_WARPS, ROWS], LOWEST, gl.float32, ROW)
        total = gl.zeros([_WARPS, ROWS], gl.float32, ROW)
        acc = gl.zeros([_WARPS, ROWS, D], gl.float32, MMA)
        start = begin
        while start < end:
            while sent < used + STAGES:  # the place of the tile before has been read, once all have come here
                if ahead >= ahead_end:
                    while (ahead >= ahead_end) & (ahead_item < num_items):
                        ahead_item += programs
                        if ahead_item < num_items:
                            ahead_seq, _, ahead, ahead_end, _ = _piece(
                                ahead_item // KV_HEADS, seq, length, tiles_per_split, upto
                            )
                if ahead < ahead_end:
                    block = gl.load(table_ptr + ahead_seq.to(gl.int64) * stride_table + ahead // BLOCK_SIZE)
                    offset = block.to(gl.int64) * stride_block + ahead % BLOCK_SIZE * stride_kn
                    offset += (ahead_item % KV_HEADS) * stride_kh
                    _copy_tile(keys.index(sent % STAGES), k_ptr + offset, stride_kn, ahead_end - ahead, D)
                    _copy_tile(values.index(sent % STAGES), v_ptr + offset, stride_kn, ahead_end - ahead, D)
                    ahead += KEYS
                async_copy.commit_group()
                sent += 1
            async_copy.wait_group(STAGES - 1)
            place = used % STAGES
            products = gl.zeros([_WARPS, ROWS, _OWN_KEYS], gl.float32, MMA)
            products = mma_v2(q, keys.index(place).permute((0, 2, 1)).load(KEY), products)
            warp, _, key = places_of(_WARPS, ROWS, _OWN_KEYS, MMA)
            scores = gl.where(start + warp * _OWN_KEYS + key < end, products * factor, float("-inf"))
            now = gl.maximum(largest, gl.max(scores, 2))
            weights = gl.exp2(scores - now[:, :, None])
            rescale = gl.exp2(largest - now)
            largest = now
            total = total * rescale + gl.sum(weights, 2)
            weights = gl.convert_layout(weights.to(DTYPE), QUERY, assert_trivial=True)
            acc = mma_v2(weights, values.index(place).load(KEY), acc * rescale[:, :, None])
            used += 1
            start += KEYS
        first_head = kv_head * GROUP
        target = out_ptr + own * stride_ot + first_head * stride_oh
        few, more = _rows_of(largest)
        acc_few, acc_more = gl.split(acc.reshape([_WARPS, 2, _EIGHT, D]).permute(0, 2, 3, 1))
        total_few, total_more = _rows_of(total)
        lse_offset = own * stride_lt + first_head * stride_lh
        if num_pieces == 1:
            _finish(
                *(few, total_few, acc_few, v_scale, parts, largest_parts, total_parts, target, stride_oh),
                *(lse_ptr, lse_offset, stride_lh, LN_2, FEW, D),
            )
            if GROUP > _EIGHT:
                _finish(
                    *(more, total_more, acc_more, v_scale, parts, largest_parts, total_parts),
                    *(target + _EIGHT * stride_oh, stride_oh),
                    *(lse_ptr, lse_offset + _EIGHT * stride_lh, stride_lh, LN_2, GROUP - FEW, D),
                )
        elif partial_ptr is not None:
            begin_slot = (own * NUM_HEADS + first_head) * num_splits
            slot = begin_slot + split
            _finish(
                *(few, total_few, acc_few, v_scale, parts, largest_parts, total_parts),
                *(partial_ptr + slot * D, num_splits * D, partial_lse_ptr, slot, num_splits, 1.0, FEW, D),
            )
            if GROUP > _EIGHT:
                slot += _EIGHT * num_splits
                _finish(
                    *(more, total_more, acc_more, v_scale, parts, largest_parts, total_parts),
                    *(partial_ptr + slot * D, num_splits * D, partial_lse_ptr, slot, num_splits, 1.0, GROUP - FEW, D),
                )
            counter_ptr = counters_ptr + own * KV_HEADS + kv_head
            _barrier()  # what all threads have written is released by the one that counts
            if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_pieces - 1:
                gl.store(counter_ptr, 0)
                _merge(
                    *(partial_ptr, partial_lse_ptr, begin_slot, num_splits, num_pieces, target, stride_oh),
                    *(lse_ptr, lse_offset, stride_lh, FEW, D),
                )
                if GROUP > _EIGHT:
                    _merge(
                        *(partial_ptr, partial_lse_ptr, begin_slot + _EIGHT * num_splits, num_splits, num_pieces),
                        *(target + _EIGHT * stride_oh, stride_oh),
                        *(lse_ptr, lse_offset + _EIGHT * stride_lh, stride_lh, GROUP - FEW, D),
                    )
        item += programs
