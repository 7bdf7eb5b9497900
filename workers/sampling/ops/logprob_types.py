"""The most likely tokens of a step, on their way to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TopLogprobs(NamedTuple):
    """Of N rows; what is there for a row that does not ask for it is without meaning.

    Attributes:
        chosen: float32 (N,), of the row's token.
        token_ids: int64 (N, n), the likeliest first, of equally likely ones the lowest id first.
        values: float32 (N, n), theirs.
    """

    chosen: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor
