"""The rows of a batch whose tokens are sampled, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChoiceRows:
    """What the choice depends on beside the logits.

    Attributes:
        words: int32 (N, WORDS), see `workers.sampling.ops.row_params`.
        seq_lens: int32 (N,), tokens of each row, prompt and output, with the one that is chosen here.
        marks: int32 (slots, V), see `workers.sampling.ops.penalties`; the chosen token's is counted.
        any_filtered: whether a row may have a filter (top-k, top-p, min-p), known to the host.
        any_unfiltered: whether a row may have none.
    """

    words: torch.Tensor
    seq_lens: torch.Tensor
    marks: torch.Tensor
    any_filtered: bool = True
    any_unfiltered: bool = True
