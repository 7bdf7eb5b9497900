"""The grouped product with weights in MXFP4 for few pairs of an expert, on Hopper GPUs, in Gluon.

With few columns a warpgroup's matrix instruction takes as long as with many, and reading the weights is a third of the
time that it and unpacking take in turn. The instruction of one warp (`mma.sync`) multiplies as many numbers three times
as fast, and the next one need not wait for it. Programs stay: each takes every n-th block of the result, and loads the
next block's first weights while it finishes the one before.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.ops.triton import gated_activation as activations
from workers.ops.triton import mxfp4_numbers

INPUTS = gl.constexpr(128)
"""Of a step. A tile of other sizes has another layout in shared memory."""
gated_activation = gluon.jit(activations.gated_activation.fn)
quarters = gluon.jit(mxfp4_numbers.quarters.fn)


@gluon.jit
def _numbers(
    words: gl.tensor, exponents: gl.tensor, OUTPUTS: gl.constexpr, BLOCKS: gl.constexpr, OPERAND: gl.constexpr
) -> gl.tensor:
    """The numbers of words, (OUTPUTS, 32 * BLOCKS) bfloat16, as `mxfp4_numbers.mxfp4_in_order` has them.

    Args:
        words: (OUTPUTS, 8 * BLOCKS) int16, in the operand's layout: two neighbours are a register.
        exponents: (OUTPUTS,) int32, those of four blocks.
        OUTPUTS: rows.
        BLOCKS: four.
        OPERAND: the layout.
    """
    block = gl.arange(0, BLOCKS * 8, gl.SliceLayout(0, OPERAND)) // 8
    bits = ((exponents[:, None] >> (8 * block)[None, :]) & 255) << 7
    factors = bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
    first, second, third, fourth = quarters(words, factors, gl.bfloat16)
    numbers = gl.join(gl.join(first, third), gl.join(second, fourth)).reshape(OUTPUTS, BLOCKS, 8, 4)
    numbers = numbers.permute(0, 1, 3, 2).reshape(OUTPUTS, BLOCKS * 32)
    return gl.convert_layout(numbers, OPERAND, assert_trivial=True)


@gluon.jit
def _tile_rows(
    tile: gl.tensor,
    num_tiles: gl.tensor,
    tiles_ptr: gl.tensor,
    pairs_ptr: gl.tensor | None,
    row: gl.tensor,
    PAIRS_PER_ROW: gl.constexpr,
    SPREAD: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """`pair_tiles.pair_rows` of sorted pairs, for these rows of a tile."""
    own = row + gl.load(tiles_ptr + num_tiles + tile)
    there = own < gl.load(tiles_ptr + 2 * num_tiles + tile)
    source = own
    destination = own
    if PAIRS_PER_ROW > 0:
        source = gl.load(pairs_ptr + own, mask=there, other=0) // PAIRS_PER_ROW
    if SPREAD:
        destination = gl.load(pairs_ptr + own, mask=there, other=0)
    return source, destination, there


@gluon.jit
def _num_items(
    tiles_ptr: gl.tensor, num_tiles: gl.tensor, NUM_EXPERTS: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr
) -> gl.tensor:
    """Blocks of the result: the tiles with an expert are the first ones."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tile = gl.arange(0, TILES, LAYOUT)
    experts = gl.load(tiles_ptr + tile, mask=tile < num_tiles, other=NUM_EXPERTS)
    return gl.sum((experts < NUM_EXPERTS).to(gl.int32), 0) * COLUMNS


@gluon.jit
def _finish(
    result: gl.tensor,
    up: gl.tensor,
    item: gl.tensor,
    out_ptr: gl.tensor,
    bias_ptr: gl.tensor | None,
    pairs_ptr: gl.tensor | None,
    tiles_ptr: gl.tensor,
    num_tiles: gl.tensor,
    M: gl.constexpr,
    PARTS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPREAD: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    OUTPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    MMA: gl.constexpr,
) -> None:
    """Bias, activation and the way out for a block of the result."""
    tile = item // COLUMNS
    row = gl.arange(0, ROWS, gl.SliceLayout(0, MMA))
    _, destination, there = _tile_rows(tile, num_tiles, tiles_ptr, pairs_ptr, row, 0, SPREAD)
    feature = item % COLUMNS * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, MMA))
    inside = feature < M
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + gl.load(tiles_ptr + tile) * (PARTS * M) + feature
        result += gl.load(bias_ptrs, mask=inside, other=0.0).to(gl.float32)[:, None]
        if PARTS == 2:
            up += gl.load(bias_ptrs + M, mask=inside, other=0.0).to(gl.float32)[:, None]
    if PARTS == 2:
        result = gated_activation(result, up, KIND, ALPHA, LIMIT)
    out_ptrs = out_ptr + destination[None, :].to(gl.int64) * M + feature[:, None]
    gl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=there[None, :] & inside[:, None])


@gluon.jit
def _copy_weights(
    words: gl.shared_memory_descriptor,
    exponents: gl.shared_memory_descriptor,
    place: gl.tensor,
    words_ptr: gl.tensor,
    exponents_ptr: gl.tensor,
    expert: gl.tensor,
    first: gl.tensor,
    step: gl.tensor,
    M: gl.constexpr,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
) -> None:
    """Send for one step's words and exponents of every part, to `place` and behind it."""
    WEIGHT_ROWS: gl.constexpr = PARTS * M
    WORDS: gl.constexpr = INPUTS // 4
    ALL_FOURS: gl.constexpr = (K // 32 + 3) // 4
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [gl.num_warps() // 2, 2], [0, 1])
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    output = first + gl.arange(0, OUTPUTS, gl.SliceLayout(1, COPY))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, COPY))
    line = first + gl.arange(0, OUTPUTS, LINE)
    own_words = words_ptr + expert.to(gl.int64) * (WEIGHT_ROWS * (K // 4)) + step * (INPUTS // 32 * WEIGHT_ROWS * 8)
    own_exponents = exponents_ptr + expert.to(gl.int64) * (WEIGHT_ROWS * ALL_FOURS) + step * WEIGHT_ROWS
    offsets = output[:, None] * 8 + (word // 8 * (WEIGHT_ROWS * 8) + word % 8)[None, :]
    mask = (output < M)[:, None] & (step * (INPUTS // 32) + word // 8 < K // 32)[None, :]
    for part in gl.static_range(PARTS):
        ptrs = own_words + part * (M * 8) + offsets
        async_copy.async_copy_global_to_shared(words.index(place + part), ptrs, mask=mask)
        lines = own_exponents + part * M + line
        async_copy.async_copy_global_to_shared(exponents.index(place + part), lines, mask=line < M)


@gluon.jit
def _copy_rows(
    rows: gl.shared_memory_descriptor,
    place: gl.tensor,
    x_ptr: gl.tensor,
    source: gl.tensor,
    there: gl.tensor,
    stride_x: gl.tensor,
    step: gl.tensor,
    K: gl.constexpr,
    COPY: gl.constexpr,
) -> None:
    """Send for one step's columns of a tile's rows; zeros come where there is no pair."""
    column = step * INPUTS + gl.arange(0, INPUTS, gl.SliceLayout(0, COPY))
    ptrs = x_ptr + source.to(gl.int64)[:, None] * stride_x + column[None, :]
    async_copy.async_copy_global_to_shared(rows.index(place), ptrs, mask=there[:, None] & (column < K)[None, :])


@gluon.jit(do_not_specialize=["num_tiles"])
def mxfp4_few_rows_kernel(
    out_ptr: gl.tensor,
    x_ptr: gl.tensor,
    words_ptr: gl.tensor,
    exponents_ptr: gl.tensor,
    bias_ptr: gl.tensor | None,
    pairs_ptr: gl.tensor | None,
    tiles_ptr: gl.tensor,
    num_tiles: gl.tensor,
    stride_x: gl.tensor,
    NUM_EXPERTS: gl.constexpr,
    M: gl.constexpr,
    K: gl.constexpr,
    PAIRS_PER_ROW: gl.constexpr,
    SPREAD: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    ROUTED_BEFORE: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """One program: every n-th block of `OUTPUTS` of the `M` columns of a tile's result, n programs being launched.

    The arguments are those of `mxfp4_rows_kernel`. `TILES` is a power of two, at least the number of tiles.
    """
    GATED: gl.constexpr = KIND is not None
    PARTS: gl.constexpr = 2 if GATED else 1
    COLUMNS: gl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    STEPS: gl.constexpr = (K + INPUTS - 1) // INPUTS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    # A row's block of 16 bytes follows the one of the row before: eight of them are a matrix that is loaded at once.
    WORDS: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [0, 8], [0, 16]]
    )
    words = gl.allocate_shared_memory(gl.int16, [STAGES * PARTS, OUTPUTS, INPUTS // 4], WORDS)
    exponents = gl.allocate_shared_memory(gl.int32, [STAGES * PARTS, OUTPUTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, INPUTS], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, X_COPY))

    if PDL and not ROUTED_BEFORE:
        gdc_wait()
        gdc_launch_dependents()
    item = gl.program_id(0)
    programs = gl.num_programs(0)
    num_items = _num_items(tiles_ptr, num_tiles, NUM_EXPERTS, COLUMNS, TILES)
    total = (num_items - item + programs - 1) // programs * STEPS
    if total > 0:
        ahead = item  # the block whose weights are sent for, and of which step
        expert = gl.load(tiles_ptr + ahead // COLUMNS)
        first = ahead % COLUMNS * OUTPUTS
        source, _, there = _tile_rows(ahead // COLUMNS, num_tiles, tiles_ptr, pairs_ptr, row, PAIRS_PER_ROW, False)
        for stage in gl.static_range(STAGES - 1):  # no block has fewer steps
            _copy_weights(
                *(words, exponents, stage * PARTS, words_ptr, exponents_ptr, expert, first, stage),
                *(M, K, PARTS, OUTPUTS),
            )
        if PDL and ROUTED_BEFORE:
            gdc_wait()
            gdc_launch_dependents()
        for stage in gl.static_range(STAGES - 1):
            _copy_rows(rows, stage, x_ptr, source, there, stride_x, stage, K, X_COPY)
            async_copy.commit_group()
        ahead_step = STAGES - 1
        step = 0
        result = gl.zeros([OUTPUTS, ROWS], gl.float32, MMA)
        up = gl.zeros([OUTPUTS, ROWS], gl.float32, MMA)
        for i in range(total):
            async_copy.wait_group(STAGES - 2)
            place = i % STAGES
            x = rows.index(place).permute((1, 0)).load(X)
            own = words.index(place * PARTS).load(WEIGHT)
            scale = exponents.index(place * PARTS).load(gl.SliceLayout(1, WEIGHT))
            if GATED:
                up_own = words.index(place * PARTS + 1).load(WEIGHT)
                up_scale = exponents.index(place * PARTS + 1).load(gl.SliceLayout(1, WEIGHT))
            if i + (STAGES - 1) < total:
                if ahead_step == STEPS:
                    ahead += programs
                    ahead_step = 0
                    expert = gl.load(tiles_ptr + ahead // COLUMNS)
                    first = ahead % COLUMNS * OUTPUTS
                    source, _, there = _tile_rows(
                        ahead // COLUMNS, num_tiles, tiles_ptr, pairs_ptr, row, PAIRS_PER_ROW, False
                    )
                free = (i + (STAGES - 1)) % STAGES
                _copy_weights(
                    *(words, exponents, free * PARTS, words_ptr, exponents_ptr, expert, first, ahead_step),
                    *(M, K, PARTS, OUTPUTS),
                )
                _copy_rows(rows, free, x_ptr, source, there, stride_x, ahead_step, K, X_COPY)
                ahead_step += 1
            async_copy.commit_group()
            result = mma_v2(_numbers(own, scale, OUTPUTS, INPUTS // 32, WEIGHT), x, result)
            if GATED:
                up = mma_v2(_numbers(up_own, up_scale, OUTPUTS, INPUTS // 32, WEIGHT), x, up)
            step += 1
            if step == STEPS:
                _finish(
                    *(result, up, item, out_ptr, bias_ptr, pairs_ptr, tiles_ptr, num_tiles),
                    *(M, PARTS, COLUMNS, SPREAD, KIND, ALPHA, LIMIT, OUTPUTS, ROWS, MMA),
                )
                result = gl.zeros([OUTPUTS, ROWS], gl.float32, MMA)
                up = gl.zeros([OUTPUTS, ROWS], gl.float32, MMA)
                step = 0
                item += programs
    elif PDL and ROUTED_BEFORE:
        gdc_wait()
