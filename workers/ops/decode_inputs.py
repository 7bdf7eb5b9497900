"""What a decode step computes first: from the rows that a batch keeps on the device to the inputs of the model."""

from __future__ import annotations

import torch

from workers.ops.decode_input_types import PADDING_LEN, DecodeInputs


def decode_inputs(
    tokens: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """Describe the next token of every row, and count it: `seq_lens` grows by one, except in padding rows.

    Args:
        tokens: (n,) int64, the last token of each row; negative where none could be chosen.
        seq_lens: (n,) int32, tokens of each row with that one, or `PADDING_LEN`; changed.
        block_tables: (n, max_blocks) int32, with a block for it; the elements of a row contiguous.
        block_size: tokens in a block.
    """
    if not tokens.is_cuda:
        return decode_inputs_torch(tokens, seq_lens, block_tables, block_size)
    from workers.ops.triton.decode_inputs import launch_decode_inputs

    return launch_decode_inputs(tokens, seq_lens, block_tables, block_size)


def decode_inputs_torch(
    tokens: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """`decode_inputs` in plain torch."""
    lens = seq_lens.clone()
    slots = decode_slots_torch(lens, block_tables, block_size)
    seq_lens.add_(lens != PADDING_LEN)
    return DecodeInputs(tokens.clamp_min(0), lens.long() - 1, slots, lens)


def decode_slots(seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the last token of every row is stored in a further cache group: (n,) int64, -1 in padding rows.

    Args:
        seq_lens: (n,) int32, as `DecodeInputs` has them.
        block_tables: (n, max_blocks) int32, of the group; the elements of a row contiguous.
        block_size: tokens in a block of it.
    """
    if not seq_lens.is_cuda:
        return decode_slots_torch(seq_lens, block_tables, block_size)
    from workers.ops.triton.decode_inputs import launch_decode_slots

    return launch_decode_slots(seq_lens, block_tables, block_size)


def decode_slots_torch(seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int) -> torch.Tensor:
    """`decode_slots` in plain torch."""
    positions = seq_lens.long() - 1
    blocks = block_tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    slots = torch.add(positions % block_size, blocks, alpha=block_size)
    return slots.masked_fill_(seq_lens == PADDING_LEN, -1)
