"""Numbers out of the words of `workers.ops.mxfp4_words`, in registers.

Nothing here is a step that the compiler would not do in the layout of a matrix instruction's operand: packed words are
read from shared memory into that layout, and never go back.
"""
# ruff: noqa: N803, SIM300  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mxfp4_factors(exponents: tl.tensor, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """What the bits of each word's numbers are multiplied with: 2^126 times what their block's scale means.

    Args:
        exponents: (OUTPUTS, BLOCKS // 4) int32, four blocks' in each.
        OUTPUTS: rows.
        BLOCKS: blocks of a row.
        DTYPE: bfloat16, or float32 where the interpreter runs.

    Returns:
        (OUTPUTS, 8 * BLOCKS) of that dtype.
    """
    even = tl.join(exponents & 255, (exponents >> 16) & 255)
    odd = tl.join((exponents >> 8) & 255, (exponents >> 24) & 255)
    own = tl.join(even, odd).reshape(OUTPUTS, BLOCKS)
    if DTYPE == tl.bfloat16:
        factors = (own << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        factors = (own << 23).to(tl.float32, bitcast=True)
    return factors[:, :, None].broadcast_to(OUTPUTS, BLOCKS, 8).reshape(OUTPUTS, BLOCKS * 8)


@triton.jit
def quarters(
    words: tl.tensor, factors: tl.tensor, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four numbers of each word, exact.

    Args:
        words: int16.
        factors: of the same shape, as `mxfp4_factors` makes them.
        DTYPE: theirs, and the numbers'.
    """
    if DTYPE == tl.bfloat16:
        # Two words and two factors are in a register each.
        first, second, third, fourth = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 n<4>, t, u;
            and.b32 n0, $4, 0x81C081C0;
            shl.b32 t, $4, 3;
            and.b32 n1, t, 0x81C081C0;
            shl.b32 t, $4, 6;
            and.b32 n2, t, 0x81C081C0;
            shr.u32 t, $4, 6;
            and.b32 n3, t, 0x01800180;
            shl.b32 t, $4, 4;
            and.b32 t, t, 0x80008000;
            shr.u32 u, $4, 4;
            and.b32 u, u, 0x00400040;
            or.b32 n3, n3, t;
            or.b32 n3, n3, u;
            mul.rn.bf16x2 $0, n0, $5;
            mul.rn.bf16x2 $1, n1, $5;
            mul.rn.bf16x2 $2, n2, $5;
            mul.rn.bf16x2 $3, n3, $5;
            }
            """,
            "=r,=r,=r,=r,r,r",
            [words, factors],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        word = words.to(tl.int32)
        first = (((word & 0x8000) << 16) | ((word & 0x01C0) << 16)).to(tl.float32, bitcast=True) * factors
        second = (((word & 0x1000) << 19) | ((word & 0x0038) << 19)).to(tl.float32, bitcast=True) * factors
        third = (((word & 0x0200) << 22) | ((word & 0x0007) << 22)).to(tl.float32, bitcast=True) * factors
        fourth = ((word & 0x0800) << 20) | ((word & 0x6000) << 10) | ((word & 0x0400) << 12)
        fourth = fourth.to(tl.float32, bitcast=True) * factors
    return first, second, third, fourth


@triton.jit
def mxfp4_in_order(
    words: tl.tensor, factors: tl.tensor, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """The numbers of words as one matrix, its columns in the order of the inputs.

    In a matrix instruction's operand no number leaves its thread for it: a word's neighbours of one quarter are a
    register, and two quarters are its two registers of a row.

    Args:
        words: (OUTPUTS, 8 * BLOCKS) int16.
        factors: of the same shape.
        OUTPUTS: rows.
        BLOCKS: blocks of a row.
        DTYPE: of the factors and the numbers.

    Returns:
        (OUTPUTS, 32 * BLOCKS).
    """
    first, second, third, fourth = quarters(words, factors, DTYPE)
    numbers = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(OUTPUTS, BLOCKS, 8, 4)
    return numbers.permute(0, 1, 3, 2).reshape(OUTPUTS, BLOCKS * 32)
