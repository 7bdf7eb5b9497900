"""Merging two attentions of the same queries over disjoint keys."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.errors import AttentionInputError
from attention.ops.triton.launch import check_device, check_span, on_device
from attention.ops.triton.tiles import LN_2, LOG2_E

_MAX_ELEMENTS = 4096  # of a program's tile


@triton.jit
def _merge_kernel(
    out_ptr: tl.tensor,
    out_lse_ptr: tl.tensor | None,
    a_ptr: tl.tensor,
    a_lse_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_lse_ptr: tl.tensor,
    stride_ot: tl.tensor,
    stride_oh: tl.tensor,
    stride_olt: tl.tensor,
    stride_olh: tl.tensor,
    stride_at: tl.tensor,
    stride_ah: tl.tensor,
    stride_alt: tl.tensor,
    stride_alh: tl.tensor,
    stride_bt: tl.tensor,
    stride_bh: tl.tensor,
    stride_blt: tl.tensor,
    stride_blh: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
) -> None:
    """One program: `HEADS_TILE` heads of one token. Grid (T, tiles of heads)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    columns = tl.arange(0, D_PAD)
    valid = heads < HEADS
    mask = valid[:, None] & (columns < D)[None, :]
    a_lse = tl.load(a_lse_ptr + token * stride_alt + heads * stride_alh, mask=valid, other=0.0) * LOG2_E
    b_lse = tl.load(b_lse_ptr + token * stride_blt + heads * stride_blh, mask=valid, other=0.0) * LOG2_E
    largest = tl.maximum(a_lse, b_lse)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    a_weight = tl.exp2(a_lse - reference)
    b_weight = tl.exp2(b_lse - reference)
    total = a_weight + b_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    # What saw nothing is not read: it may be anything.
    a_rows = a_ptr + token * stride_at + heads[:, None] * stride_ah + columns[None, :]
    b_rows = b_ptr + token * stride_bt + heads[:, None] * stride_bh + columns[None, :]
    a = tl.load(a_rows, mask=mask & (a_weight > 0.0)[:, None], other=0.0).to(tl.float32)
    b = tl.load(b_rows, mask=mask & (b_weight > 0.0)[:, None], other=0.0).to(tl.float32)
    merged = a * (a_weight / divisor)[:, None] + b * (b_weight / divisor)[:, None]
    out_rows = out_ptr + token * stride_ot + heads[:, None] * stride_oh + columns[None, :]
    tl.store(out_rows, merged.to(out_ptr.dtype.element_ty), mask=mask)
    if out_lse_ptr is not None:
        lse = (largest + tl.log2(divisor)) * LN_2
        tl.store(out_lse_ptr + token * stride_olt + heads * stride_olh, lse, mask=valid)


def merge_attn_states(
    output: torch.Tensor,
    a: torch.Tensor,
    a_lse: torch.Tensor,
    b: torch.Tensor,
    b_lse: torch.Tensor,
    *,
    output_lse: torch.Tensor | None = None,
) -> None:
    """Merge attentions over disjoint keys: each weighs by its softmax's denominator.

    Where one saw nothing the other is taken as it is, whatever the first holds; where both did, zeros.

    Args:
        output: (T, Hq, D), written; may be `a` or `b`.
        a: (T, Hq, D).
        a_lse: (T, Hq) fp32, natural logarithm of the denominator, -inf where `a` saw nothing.
        b: (T, Hq, D).
        b_lse: (T, Hq) likewise.
        output_lse: (T, Hq) fp32, written: that of all keys together.

    Raises:
        AttentionInputError: shapes that differ.
    """
    tokens, num_heads, head_size = output.shape
    lses = [a_lse, b_lse] if output_lse is None else [a_lse, b_lse, output_lse]
    if not a.shape == b.shape == output.shape or any(x.shape != output.shape[:2] for x in lses):
        raise AttentionInputError(
            f"outputs of shape {tuple(output.shape)}, {tuple(a.shape)}, {tuple(b.shape)} with log-sum-exps of "
            f"{', '.join(str(tuple(x.shape)) for x in lses)}"
        )
    if any(x.stride(2) != 1 for x in (output, a, b)):
        raise AttentionInputError("the elements of a head must be contiguous")
    for name, tensor in (("output", output), ("the first state", a), ("the second state", b)):
        check_span(f"a token of {name}", tensor, 2)
    check_device(output)
    if tokens == 0:
        return
    head_size_padded = triton.next_power_of_2(head_size)
    tile = max(1, min(triton.next_power_of_2(num_heads), _MAX_ELEMENTS // head_size_padded))
    with on_device(output):
        _merge_kernel[(tokens, -(-num_heads // tile))](
            output, output_lse, a, a_lse, b, b_lse,
            output.stride(0), output.stride(1), *((0, 0) if output_lse is None else output_lse.stride()),
            a.stride(0), a.stride(1), *a_lse.stride(), b.stride(0), b.stride(1), *b_lse.stride(),
            HEADS=num_heads, HEADS_TILE=tile, D=head_size, D_PAD=head_size_padded, num_warps=4,
        )  # fmt: skip
