"""The kernels of `decode_inputs`."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.ops.triton.launch import on_device
from workers.ops.decode_input_types import PADDING_LEN, DecodeInputs

_ROWS = 128


@triton.jit(do_not_specialize=["num_rows"])
def decode_inputs_kernel(
    token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride_table: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: `ROWS` rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    length = tl.load(seq_lens_ptr + row, mask=mask, other=PADDING)
    token = tl.load(tokens_ptr + row, mask=mask, other=0)
    real = length != PADDING
    position = length - 1
    block_ptrs = tables_ptr + row.to(tl.int64) * stride_table + position // BLOCK_SIZE
    block = tl.load(block_ptrs, mask=mask & real, other=0).to(tl.int64)
    slot = tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(token_ids_ptr + row, tl.maximum(token, 0), mask=mask)
    tl.store(positions_ptr + row, position.to(tl.int64), mask=mask)
    tl.store(slots_ptr + row, slot, mask=mask)
    tl.store(lens_ptr + row, length, mask=mask)
    tl.store(seq_lens_ptr + row, length + real.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def decode_slots_kernel(
    slots_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride_table: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: `ROWS` rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    length = tl.load(lens_ptr + row, mask=mask, other=PADDING)
    real = length != PADDING
    position = length - 1
    block_ptrs = tables_ptr + row.to(tl.int64) * stride_table + position // BLOCK_SIZE
    block = tl.load(block_ptrs, mask=mask & real, other=0).to(tl.int64)
    tl.store(slots_ptr + row, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=mask)


def launch_decode_slots(seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int) -> torch.Tensor:
    """See `workers.ops.decode_inputs`."""
    num_rows = seq_lens.shape[0]
    slots = torch.empty(num_rows, dtype=torch.int64, device=seq_lens.device)
    if num_rows:
        with on_device(seq_lens):
            decode_slots_kernel[(triton.cdiv(num_rows, _ROWS),)](
                slots,
                seq_lens,
                block_tables,
                num_rows,
                block_tables.stride(0),
                BLOCK_SIZE=block_size,
                PADDING=PADDING_LEN,
                ROWS=_ROWS,
            )
    return slots


def launch_decode_inputs(
    tokens: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """See `workers.ops.decode_inputs`."""
    num_rows = tokens.shape[0]
    token_ids, positions, slots = torch.empty(3, num_rows, dtype=torch.int64, device=tokens.device).unbind(0)
    lens = torch.empty_like(seq_lens)
    if num_rows:
        with on_device(tokens):
            decode_inputs_kernel[(triton.cdiv(num_rows, _ROWS),)](
                token_ids,
                positions,
                slots,
                lens,
                tokens,
                seq_lens,
                block_tables,
                num_rows,
                block_tables.stride(0),
                BLOCK_SIZE=block_size,
                PADDING=PADDING_LEN,
                ROWS=_ROWS,
            )
    return DecodeInputs(token_ids, positions, slots, lens)
