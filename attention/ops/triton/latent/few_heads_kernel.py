"""The decode kernel of latent attention on Hopper for up to 16 heads, as a model of few heads or a rank has them.

Four warps share a tile of latents. For the scores, a warp has one half of the columns and one half of the tokens: its
half of the queries stays in registers, and products are summed up across two warps. Every warp then has all weights,
and a quarter of the output's columns. So latents are read twice from shared memory, and queries never. Matrix
instructions are those of one warp (`mma.sync`): of 16 rows, they have no rows to spare. Written in Gluon.

An FP8 cache is read as words of two numbers: a register of two words becomes two registers of numbers, of the even and
of the odd columns, each an operand as it is. Products of even and of odd columns are summed up; those with weights are
the even and the odd columns of the output.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton import decode_kernel
from attention.ops.triton.gluon_tiles import LN_2, LOG2_E, LOWEST, places_of

HEADS = gl.constexpr(16)
_HALVES = gl.constexpr(2)
"""Of a latent and of a rotary key, each in two warps. A latent's has two pieces."""

split_range = gluon.jit(decode_kernel.split_range.fn)


@gluon.jit
def _numbers(words: gl.tensor, FP8: gl.constexpr, DTYPE: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    """The numbers of words as one operand, or as two: of the even and of the odd columns. Both are there always."""
    if FP8:
        even, odd = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            .reg .b16 h, unused;
            prmt.b32 t, $2, 0, 0x4420;
            mov.b32 {h, unused}, t;
            cvt.rn.f16x2.e4m3x2 $0, h;
            prmt.b32 t, $2, 0, 0x4431;
            mov.b32 {h, unused}, t;
            cvt.rn.f16x2.e4m3x2 $1, h;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = words.to(DTYPE, bitcast=True)
        odd = even
    return even, odd


@gluon.jit
def _copy_words(
    target: gl.shared_memory_descriptor,
    ptr: gl.tensor,
    num_valid: gl.tensor,
    stride_slot: gl.tensor,
    stride_half: gl.constexpr,
    KEYS: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Send for `COLUMNS` words of each half of a tile's tokens; zeros come for tokens that there are not."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // COLUMNS, COLUMNS // 8], [1, 4, 1], [2, 1, 0])
    half, token, column = places_of(_HALVES, KEYS, COLUMNS, LAYOUT)
    ptrs = ptr + token * stride_slot + half * stride_half + column
    async_copy.async_copy_global_to_shared(target, ptrs, mask=token < num_valid)


@gluon.jit
def _copy_tile(
    latents: gl.shared_memory_descriptor,
    rotary: gl.shared_memory_descriptor,
    place: gl.tensor,
    ptr: gl.tensor,
    num_valid: gl.tensor,
    stride_slot: gl.tensor,
    KEYS: gl.constexpr,
    LATENT_WORDS: gl.constexpr,
    ROTARY_WORDS: gl.constexpr,
) -> None:
    """Send for a tile's words, from `ptr` on."""
    HALF: gl.constexpr = LATENT_WORDS // 2
    PIECE: gl.constexpr = LATENT_WORDS // 4
    ROTARY: gl.constexpr = ROTARY_WORDS // 2
    _copy_words(latents.index(2 * place), ptr, num_valid, stride_slot, HALF, KEYS, PIECE)
    _copy_words(latents.index(2 * place + 1), ptr + PIECE, num_valid, stride_slot, HALF, KEYS, PIECE)
    _copy_words(rotary.index(place), ptr + LATENT_WORDS, num_valid, stride_slot, ROTARY, KEYS, ROTARY)
    async_copy.commit_group()


@gluon.jit
def _columns(
    ptr: gl.tensor,
    stride: gl.tensor,
    stride_half: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Addresses (2, 16, `COLUMNS`) of every `STEP`-th column of each half of each head, and the heads."""
    half, head, column = places_of(_HALVES, HEADS, COLUMNS, LAYOUT)
    return ptr + head * stride + (half * stride_half + column) * STEP, head


@gluon.jit
def _load_queries(
    ptr: gl.tensor,
    stride: gl.tensor,
    stride_half: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FP8: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Queries as one operand, or as those of the even and the odd columns; zeros for heads that there are not."""
    if FP8:  # an even column and the odd one behind it at once
        pairs_ptr = ptr.to(gl.pointer_type(gl.int32), bitcast=True)
        ptrs, head = _columns(pairs_ptr, stride // 2, stride_half, COLUMNS, 1, LAYOUT)
        pairs = gl.load(ptrs, mask=head < NUM_HEADS, other=0)
        even = pairs.to(gl.int16).to(ptr.dtype.element_ty, bitcast=True)
        odd = (pairs >> 16).to(gl.int16).to(ptr.dtype.element_ty, bitcast=True)
    else:
        ptrs, head = _columns(ptr, stride, stride_half, COLUMNS, 1, LAYOUT)
        even = gl.load(ptrs, mask=head < NUM_HEADS, other=0.0)
        odd = even
    return even, odd


@gluon.jit
def _scaled(even: gl.tensor, odd: gl.tensor, factor: gl.tensor, DTYPE: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    return (even.to(gl.float32) * factor).to(DTYPE), (odd.to(gl.float32) * factor).to(DTYPE)


@gluon.jit
def _multiplied(
    q: gl.tensor,
    q_odd: gl.tensor,
    words: gl.shared_memory_descriptor,
    products: gl.tensor,
    FP8: gl.constexpr,
    DTYPE: gl.constexpr,
    KEY: gl.constexpr,
) -> gl.tensor:
    """Products of queries and keys on top of these."""
    keys, odd = _numbers(words.permute((0, 2, 1)).load(KEY), FP8, DTYPE)
    products = mma_v2(q, keys, products)
    if FP8:
        products = mma_v2(q_odd, odd, products)
    return products


@gluon.jit
def _weighed(
    weights: gl.tensor,
    words: gl.shared_memory_descriptor,
    acc: gl.tensor,
    acc_odd: gl.tensor,
    FP8: gl.constexpr,
    DTYPE: gl.constexpr,
    VALUE: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Weighted sums of values on top of these, of all columns or of the even and the odd ones."""
    values, odd = _numbers(words.load(VALUE), FP8, DTYPE)
    acc = mma_v2(weights, values, acc)
    if FP8:
        acc_odd = mma_v2(weights, odd, acc_odd)
    return acc, acc_odd


@gluon.jit
def _largest(even: gl.tensor, odd: gl.tensor) -> gl.tensor:
    largest = gl.maximum(gl.abs(even.to(gl.float32)), gl.abs(odd.to(gl.float32)))
    return gl.max(gl.max(gl.max(largest, 2), 1), 0)


@gluon.jit
def _write(
    acc: gl.tensor,
    acc_odd: gl.tensor,
    ptr: gl.tensor,
    stride: gl.tensor,
    stride_half: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FP8: gl.constexpr,
    MMA: gl.constexpr,
) -> None:
    """One piece of each half of the output."""
    STEP: gl.constexpr = 2 if FP8 else 1
    ptrs, head = _columns(ptr, stride, stride_half, COLUMNS, STEP, MMA)
    gl.store(ptrs, acc.to(ptr.dtype.element_ty), mask=head < NUM_HEADS)
    if FP8:
        gl.store(ptrs + 1, acc_odd.to(ptr.dtype.element_ty), mask=head < NUM_HEADS)


@gluon.jit(do_not_specialize=["stride_table", "num_splits", "wanted_splits", "most_tiles"])
def few_heads_latent_decode_kernel(
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    partial_lse_ptr: gl.tensor,
    q_ptr: gl.tensor,
    pe_ptr: gl.tensor,
    words_ptr: gl.tensor,
    table_ptr: gl.tensor,
    seq_lens_ptr: gl.tensor,
    scale: gl.tensor,
    cache_scale: gl.tensor,
    num_splits: gl.tensor,
    wanted_splits: gl.tensor,
    most_tiles: gl.tensor,
    stride_qt: gl.tensor,
    stride_qh: gl.tensor,
    stride_pt: gl.tensor,
    stride_ph: gl.tensor,
    stride_ot: gl.tensor,
    stride_oh: gl.tensor,
    stride_lt: gl.tensor,
    stride_lh: gl.tensor,
    stride_table: gl.tensor,
    stride_block: gl.tensor,
    stride_slot: gl.tensor,
    NUM_HEADS: gl.constexpr,
    R: gl.constexpr,
    P: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    MIN_TILES: gl.constexpr,
    FP8: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """One program: one split of a sequence's tokens, for all heads. Grid (1, splits, B).

    `words_ptr` has the cache as words of 16 bits, in which its strides are counted, too; `KEYS` of them are a tile, all
    in one block. What else is given is as of `decode_kernel.latent_decode_kernel`.
    """
    NUMBERS: gl.constexpr = 2 if FP8 else 1
    DTYPE: gl.constexpr = gl.float16 if FP8 else q_ptr.dtype.element_ty
    LATENT_WORDS: gl.constexpr = R // NUMBERS
    ROTARY_WORDS: gl.constexpr = P // NUMBERS
    HALF: gl.constexpr = LATENT_WORDS // 2
    PIECE: gl.constexpr = LATENT_WORDS // 4
    ROTARY: gl.constexpr = ROTARY_WORDS // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 1, 2], [1, 16, 8])
    QUERY: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    KEY: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    EVERY_WARP: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    ROW: gl.constexpr = gl.SliceLayout(2, EVERY_WARP)
    split = gl.program_id(1)
    seq = gl.program_id(2).to(gl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq_len = gl.load(seq_lens_ptr + seq)
    begin, end, _ = split_range(seq_len, None, split, num_splits, wanted_splits, most_tiles, KEYS, MIN_TILES)
    if (begin >= end) & (split > 0):
        return
    latents = gl.allocate_shared_memory(
        gl.int16, [2 * STAGES, _HALVES, KEYS, PIECE], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    )
    rotary = gl.allocate_shared_memory(
        gl.int16, [STAGES, _HALVES, KEYS, ROTARY], gl.SwizzledSharedLayout(8, 64 // ROTARY, ROTARY // 8, [2, 1, 0])
    )
    # Neighbours in a row are those of four threads: rows of eight threads are shifted against each other.
    parts = gl.allocate_shared_memory(
        gl.float32, [_HALVES, HEADS, KEYS], gl.SwizzledSharedLayout(8, 1, KEYS // 8, [2, 1, 0])
    )
    table_ptr += seq * stride_table
    num_tiles = gl.cdiv(end - begin, KEYS)
    last = gl.maximum(end - 1, 0) // BLOCK_SIZE
    for tile in gl.static_range(STAGES - 1):
        start = begin + tile * KEYS
        block = gl.load(table_ptr + gl.minimum(start // BLOCK_SIZE, last), mask=num_tiles > 0, other=0).to(gl.int64)
        row_ptr = words_ptr + block * stride_block + start % BLOCK_SIZE * stride_slot
        _copy_tile(latents, rotary, tile, row_ptr, end - start, stride_slot, KEYS, LATENT_WORDS, ROTARY_WORDS)
    q_ptr += seq * stride_qt
    pe_ptr += seq * stride_pt
    q, q_odd = _load_queries(q_ptr, stride_qh, HALF, NUM_HEADS, PIECE, FP8, QUERY)
    q2, q2_odd = _load_queries(q_ptr + PIECE * NUMBERS, stride_qh, HALF, NUM_HEADS, PIECE, FP8, QUERY)
    pe, pe_odd = _load_queries(pe_ptr, stride_ph, ROTARY, NUM_HEADS, ROTARY, FP8, QUERY)
    if FP8:  # what is large in bfloat16 is none in float16
        limit = gl.maximum(gl.maximum(_largest(q, q_odd), _largest(q2, q2_odd)), _largest(pe, pe_odd))
        limit = gl.maximum(limit, 1e-30)
        q, q_odd = _scaled(q, q_odd, 32768.0 / limit, DTYPE)
        q2, q2_odd = _scaled(q2, q2_odd, 32768.0 / limit, DTYPE)
        pe, pe_odd = _scaled(pe, pe_odd, 32768.0 / limit, DTYPE)
        scale = scale * (limit / 32768.0)
    factor = scale * LOG2_E
    largest = gl.full([1, HEADS], LOWEST, gl.float32, ROW)
    total = gl.zeros([1, HEADS], gl.float32, ROW)
    acc = gl.zeros([_HALVES, HEADS, PIECE], gl.float32, MMA)
    acc2 = acc
    acc_odd = acc
    acc2_odd = acc
    ahead = begin + (STAGES - 1) * KEYS
    block = gl.load(table_ptr + gl.minimum(ahead // BLOCK_SIZE, last), mask=num_tiles > 0, other=0)
    for tile in range(num_tiles):
        place = tile % STAGES
        async_copy.wait_group(STAGES - 2)
        products = gl.zeros([_HALVES, HEADS, KEYS], gl.float32, MMA)
        products = _multiplied(q, q_odd, latents.index(2 * place), products, FP8, DTYPE, KEY)
        products = _multiplied(q2, q2_odd, latents.index(2 * place + 1), products, FP8, DTYPE, KEY)
        products = _multiplied(pe, pe_odd, rotary.index(place), products, FP8, DTYPE, KEY)
        parts.store(products)
        scores = (parts.slice(0, 1, 0).load(EVERY_WARP) + parts.slice(1, 1, 0).load(EVERY_WARP)) * factor
        # All warps have come this far: what the tile before lay in has been read.
        row_ptr = words_ptr + block.to(gl.int64) * stride_block + ahead % BLOCK_SIZE * stride_slot
        free = (tile + STAGES - 1) % STAGES
        _copy_tile(latents, rotary, free, row_ptr, end - ahead, stride_slot, KEYS, LATENT_WORDS, ROTARY_WORDS)
        ahead += KEYS
        block = gl.load(table_ptr + gl.minimum(ahead // BLOCK_SIZE, last))
        tokens = begin + tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(1, EVERY_WARP)))
        scores = gl.where((tokens < end)[None, :][:, None, :], scores, float("-inf"))
        now = gl.maximum(largest, gl.max(scores, 2))
        weights = gl.exp2(scores - now[:, :, None])
        rescale = gl.exp2(largest - now)
        largest = now
        total = total * rescale + gl.sum(weights, 2)
        weights = gl.convert_layout(weights.to(DTYPE), QUERY, assert_trivial=True)
        weights = gl.zeros([_HALVES, HEADS, KEYS], DTYPE, QUERY) + weights
        rescale = gl.convert_layout(rescale, gl.SliceLayout(2, MMA), assert_trivial=True)[:, :, None]
        acc, acc_odd = _weighed(weights, latents.index(2 * place), acc * rescale, acc_odd * rescale, FP8, DTYPE, KEY)
        acc2, acc2_odd = _weighed(
            weights, latents.index(2 * place + 1), acc2 * rescale, acc2_odd * rescale, FP8, DTYPE, KEY
        )
    divisor = gl.where(total == 0.0, 1.0, total)
    lse = gl.where(total == 0.0, float("-inf"), largest + gl.log2(divisor))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, ROW))[None, :]
    if partial_ptr is None:
        target = out_ptr + seq * stride_ot
        stride = stride_oh
        if lse_ptr is not None:
            gl.store(lse_ptr + seq * stride_lt + head * stride_lh, lse * LN_2, mask=head < NUM_HEADS)
    else:
        slot = seq * NUM_HEADS * num_splits + split
        target = partial_ptr + slot * R
        stride = num_splits * R
        gl.store(partial_lse_ptr + slot + head * num_splits, lse, mask=head < NUM_HEADS)
    inverse = gl.convert_layout(cache_scale / divisor, gl.SliceLayout(2, MMA), assert_trivial=True)[:, :, None]
    _write(acc * inverse, acc_odd * inverse, target, stride, HALF, NUM_HEADS, PIECE, FP8, MMA)
    target += PIECE * NUMBERS
    _write(acc2 * inverse, acc2_odd * inverse, target, stride, HALF, NUM_HEADS, PIECE, FP8, MMA)
