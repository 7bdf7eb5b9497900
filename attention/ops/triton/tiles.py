"""What the attention kernels share: finding and loading tiles of keys, logits, the online softmax.

Logits are kept in base 2 (multiplied by log2 e), so that the softmax is `exp2`, one instruction on a GPU.
"""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def packed_rows(start: tl.tensor, stride: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Where packed keys `start` to `start + BLOCK_N` lie: (BLOCK_N,) int64 offsets."""
    return tl.cast(start, tl.int64) * stride + tl.arange(0, BLOCK_N) * stride


@triton.jit
def look_up_blocks(
    start: tl.tensor,
    end: tl.tensor,
    table_ptr: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The cache blocks of the keys `start` to `start + BLOCK_N`: one for all, or (BLOCK_N,); 0 from `end` on.

    Kernels look blocks up one step before they load the keys: a load that waits for another load would take two stages
    of the software pipeline.
    """
    if BLOCK_SIZE >= BLOCK_N:
        blocks = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
    return blocks


@triton.jit
def paged_rows(
    start: tl.tensor,
    blocks: tl.tensor,
    stride_block: tl.tensor,
    stride_slot: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Where in a paged cache the keys `start` to `start + BLOCK_N` of `look_up_blocks` lie: (BLOCK_N,) int64 offsets.

    `start` is a multiple of `BLOCK_N`.
    """
    offsets = tl.arange(0, BLOCK_N) % BLOCK_SIZE
    if BLOCK_SIZE > BLOCK_N:
        offsets += start % BLOCK_SIZE
    return blocks.to(tl.int64) * stride_block + offsets * stride_slot


@triton.jit
def load_tile(
    ptr: tl.tensor,
    rows: tl.tensor,
    in_bounds: tl.tensor,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """A (rows, D_PAD) tile in `DOT_DTYPE`; what is out of bounds, and the padding beyond `D`, is zero.

    FP8 comes either as e4m3, which hardware converts, or as its bytes: shifted into fp16's exponent and mantissa they
    are the number times 2**-8 (the exponents' biases are 7 and 15).
    """
    columns = tl.arange(0, D_PAD)
    ptrs = ptr + rows[:, None] + columns[None, :]
    if MASKED and D != D_PAD:
        tile = tl.load(ptrs, mask=in_bounds[:, None] & (columns < D)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=in_bounds[:, None], other=0.0)
    elif D != D_PAD:
        tile = tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    if tile.dtype == tl.uint8:
        bits = ((tile & 0x80).to(tl.uint16) << 8) | ((tile & 0x7F).to(tl.uint16) << 7)
        tile = bits.to(tl.float16, bitcast=True) * 256.0
    return tile.to(DOT_DTYPE)


@triton.jit
def load_queries(
    ptr: tl.tensor,
    rows: tl.tensor,
    in_bounds: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A tile of queries in `DOT_DTYPE`, and what q·k must be scaled with.

    Over FP8 keys bf16 queries become fp16, to which e4m3 converts in one step and without loss. To have their range
    they are brought to the upper end of fp16's, and the scale down.
    """
    if (ptr.dtype.element_ty == tl.bfloat16) and (DOT_DTYPE == tl.float16):  # noqa: SIM300
        q = load_tile(ptr, rows, in_bounds, D, D_PAD, tl.float32, True)
        largest = tl.maximum(tl.max(tl.max(tl.abs(q), 1), 0), 1e-30)
        q = (q * (32768.0 / largest)).to(tl.float16)
        scale = scale * (largest / 32768.0)
    else:
        q = load_tile(ptr, rows, in_bounds, D, D_PAD, DOT_DTYPE, True)
    return q, scale


@triton.jit
def logits(
    products: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor | None,
    slope: tl.tensor | None,
    query_pos: tl.tensor,
    key_pos: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Turn q·k into logits: (values, factor), where values times factor are logits in base 2.

    Without soft cap and ALiBi the factor is the scale itself: multiplying is left to the softmax, which fuses it.
    """
    factor = scale * LOG2_E
    if (soft_cap is not None) or (slope is not None):
        products = products * scale
        if soft_cap is not None:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
            products = soft_cap * (1.0 - 2.0 / (tl.exp2(products * (2.0 * LOG2_E / soft_cap)) + 1.0))
        if slope is not None:
            distance = tl.abs(query_pos[:, None] - key_pos[None, :])
            products -= slope[:, None] * distance.to(tl.float32)
        factor = LOG2_E
    return products, factor


@triton.jit
def visible(
    query_pos: tl.tensor,
    key_pos: tl.tensor,
    end: tl.tensor,
    window: tl.tensor | None,
    CAUSAL: tl.constexpr,
    CUSTOM: tl.constexpr,
) -> tl.tensor:
    """Which keys each query sees: (M, N) bool. A custom mask, applied elsewhere, stands in for `key <= query`."""
    seen = (key_pos < end)[None, :]
    if CAUSAL and not CUSTOM:
        seen = seen & (key_pos[None, :] <= query_pos[:, None])
    if window is not None:
        distance = query_pos[:, None] - key_pos[None, :]
        if not CAUSAL:
            distance = tl.abs(distance)
        seen = seen & (distance < window)
    return seen


@triton.jit
def softmax_step(
    values: tl.tensor,
    factor: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take one tile of logits into the online softmax (Milakov and Gimelshein, 2018).

    Args:
        values: (M, N), of `logits`; -inf where a query does not see a key.
        factor: of `logits`, positive.
        largest: (M,) the largest logit so far, base 2.
        total: (M,) the sum of 2**(logit - largest) so far.
        acc: (M, D) the weighted sum of values so far, rescaled here.
        MASKED: whether a row may have seen no key yet, nor see one here.

    Returns:
        The tile's weights (M, N), and `largest`, `total` and `acc` brought up to date but for the tile's values.
    """
    new_largest = tl.maximum(largest, tl.max(values, 1) * factor)
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
    weights = tl.exp2(values * factor - reference[:, None])
    rescale = tl.exp2(largest - reference)
    total = total * rescale + tl.sum(weights, 1)
    return weights, new_largest, total, acc * rescale[:, None]
