"""Bringing weights to the L2 cache before they are read."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(ptrs: tl.tensor, BYTES: tl.constexpr, THREADS: tl.constexpr) -> None:
    """Ask for `BYTES` behind each of (THREADS,) addresses in the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [ptrs.to(tl.int64), tl.full([THREADS], BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(
    weight_ptr: tl.tensor,
    first: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    BYTES: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Ask for the first columns of the program's rows in the L2 cache: `BYTES` by each thread."""
    thread = tl.arange(0, THREADS)
    row = thread % (FEATURES * PARTS)
    feature = (first + row % FEATURES + row // FEATURES * N).to(tl.int64)
    column = thread // (FEATURES * PARTS) * (BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth)
    prefetch(weight_ptr + feature * K + column, BYTES, THREADS)


def prefetched_bytes(wanted: int, row_bytes: int, rows: int, threads: int) -> int:
    """`BYTES` of `prefetch_rows`: at most `wanted`, and all threads' no more than the rows have.

    Args:
        wanted: by each thread.
        row_bytes: of one row of the weight.
        rows: that the program reads.
        threads: of the program.
    """
    if threads % rows or row_bytes % 16:
        return 0
    return min(wanted, row_bytes * rows // threads) // 16 * 16
