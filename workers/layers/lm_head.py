"""From hidden states to logits, with the vocabulary shared out among the ranks of a group."""

from __future__ import annotations

import torch
from torch import nn

from workers.layers.context import LayerContext


class LMHead(nn.Module):
    """The output matrix. Each rank multiplies with its share of the rows, and every rank gets everybody's logits.

    Args:
        vocab_size: of the whole model.
        hidden_size: H.
        tied_to: (at least size * share, H): the embedding that a tied weight is a view of; None: it has its own.
        bias: whether there is one.
        context: of the model.
    """

    weight: torch.Tensor | None
    packed: torch.Tensor | None

    def __init__(self, vocab_size: int, hidden_size: int, tied_to: torch.Tensor | None, context: LayerContext) -> None:
        super().__init__()
        group = context.group
        share = vocab_share(vocab_size, group.size)
        self.packed = None
        self.method = context.linear_method
        if tied_to is None:
            self.method.create_weights(self, hidden_size, share, context.dtype, context.device)
        else:
            self.weight = tied_to[group.rank * share : (group.rank + 1) * share]
        self._vocab_size = vocab_size
        self._is_even = share * group.size == vocab_size
        self._group = group

    def process_weights(self) -> None:
        """Call after loading; see `LinearMethod.process_weights`.

        A tied weight may then be kept twice: as rows to look up, and packed to multiply with.
        """
        self.method.process_weights(self)

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, hidden_size) to (N, vocab_size), the same bit for bit on all ranks.

        Args:
            hidden: the same on all ranks.
            out: where to write, of the result's shape and dtype, contiguous. None: a new tensor.
        """
        if self._group.size == 1:
            return self.method.apply(self, hidden, None, out=out)
        own = self.method.apply(self, hidden, None)
        if self._is_even:
            return self._group.all_gather(own, out)
        logits = self._group.all_gather(own)[:, : self._vocab_size]  # the rest are of rows that hold anything
        return logits.contiguous() if out is None else out.copy_(logits)


def vocab_share(vocab_size: int, size: int) -> int:
    """How many tokens' logits each of `size` ranks computes; the last ranks' reach past an uneven vocabulary."""
    return -(-vocab_size // size)
