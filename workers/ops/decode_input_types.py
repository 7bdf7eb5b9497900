"""What a decode step reads and advances on the device."""

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
