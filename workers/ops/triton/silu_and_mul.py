"""The kernel of `silu_and_mul`."""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch, num_sms
from attention.ops.triton.launch import on_device

_SMALL_BLOCK, _BLOCK, _NUM_WARPS = 1024, 2048, 4
"""8 elements a thread (one 16-byte load each of gate and up in 16-bit dtypes), or 16 where there is enough work."""


@triton.jit
def silu_and_mul_kernel(
    out_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    stride_out: tl.tensor,
    stride_gate_up: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: `BLOCK` of the `SIZE` columns of one token."""
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = (tl.program_id(0) // TILES).to(tl.int64)
    column = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate_ptrs = gate_up_ptr + token * stride_gate_up + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + SIZE, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * stride_out + column, result.to(out_ptr.dtype.element_ty), mask=mask)


def launch_silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """`silu(gate) * up` into `out`; see `workers.ops.silu_and_mul` for the arguments."""
    num_tokens, size = out.shape
    if out.numel() == 0:
        return
    few = num_tokens * triton.cdiv(size, _SMALL_BLOCK) <= num_sms(gate_up.device)
    block = min(_SMALL_BLOCK if few else _BLOCK, triton.next_power_of_2(size))
    num_programs = num_tokens * triton.cdiv(size, block)
    with on_device(gate_up):
        silu_and_mul_kernel[(num_programs,)](
            out,
            gate_up,
            out.stride(0),
            gate_up.stride(0),
            SIZE=size,
            BLOCK=block,
            num_warps=_NUM_WARPS,
            **dependent_launch(gate_up.device, num_programs),
        )
