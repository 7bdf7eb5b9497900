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
        bias: float32 (slots, V), added to the logits of rows with a `bias_slot`; None: there are none.
        masks: int32 (at least N, ⌈V / 32⌉), which tokens may come in a row that is `masked`, bit i % 32 of word
            i // 32 for token i; None: there are none.
        any_filtered: whether a row may have a filter (top-k, top-p, min-p), known to the host.
    """

    words: torch.Tensor
    seq_lens: torch.Tensor
    marks: torch.Tensor
    bias: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    any_filtered: bool = True

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """`marks`, `bias`, `masks`, `words` and `seq_lens` for a kernel; for what there is not, some of its dtype."""
        bias = self.words.view(torch.float32) if self.bias is None else self.bias
        masks = self.words if self.masks is None else self.masks
        return self.marks, bias, masks, self.words, self.seq_lens
