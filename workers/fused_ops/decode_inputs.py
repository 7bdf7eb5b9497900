"""What a decode step computes first: from the rows that a batch keeps on the device to the inputs of the model."""

from __future__ import annotations

from typing import NamedTuple

import torch

PADDING_LEN = 1
"""Length of a row that no sequence has. A sequence has a prompt and a first token, hence at least two."""


class DecodeInputs(NamedTuple):
    """One token for each of n rows.

    Attributes:
        token_ids: (n,) int64; 0 where no token could be chosen, so that there is something to look up.
        positions: (n,) int64, of the token in its sequence.
        slot_mapping: (n,) int64, where its key and value are stored; -1 in padding rows.
        seq_lens: (n,) int32, the tokens of the row with this one.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor


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
    from workers.fused_ops.triton_decode_inputs import launch_decode_inputs

    return launch_decode_inputs(tokens, seq_lens, block_tables, block_size)


def decode_inputs_torch(
    tokens: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> DecodeInputs:
    """`decode_inputs` in plain torch."""
    lens = seq_lens.clone()
    positions = lens.long() - 1
    padding = lens == PADDING_LEN
    blocks = block_tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    slots = torch.add(positions % block_size, blocks, alpha=block_size).masked_fill_(padding, -1)
    seq_lens.add_(~padding)
    return DecodeInputs(tokens.clamp_min(0), positions, slots, lens)
