"""From hidden states to logits, with the vocabulary shared out among the ranks of a group."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.linear import empty_parameter, pack_weight, packed_linear
from workers.models.config.model_config import ModelConfig
from workers.ops.skinny_linear import skinny_linear
from workers.ops.skinny_tiles import skinny_tile
from workers.parallel.group import TensorParallelGroup


class LMHead(nn.Module):
    """The output matrix. Each rank multiplies with its share of the rows, and every rank gets everybody's logits.

    Args:
        config: the architecture of the whole model.
        embeddings: (at least size * vocab_share, hidden_size): a tied weight is a view of them.
        dtype: of the weights.
        device: where they are.
        group: the ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        embeddings: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorParallelGroup,
    ) -> None:
        super().__init__()
        share = config.vocab_share(group.size)
        tied = config.tie_word_embeddings
        self.weight = None if tied else empty_parameter(share, config.hidden_size, dtype=dtype, device=device)
        self._tied = embeddings[group.rank * share : (group.rank + 1) * share] if tied else None
        self._packed: torch.Tensor | None = None
        self._vocab_size = config.vocab_size
        self._is_even = share * group.size == config.vocab_size
        self._group = group

    def pack(self) -> None:
        """Bring the weight into the order that the device's kernels read fastest; after this none can be loaded.

        A tied one is then kept twice: as rows to look up, and packed to multiply with.
        """
        self._packed = pack_weight(self._own_weight())
        if self._packed is not None:
            self.weight = None

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, hidden_size) to (N, vocab_size), the same bit for bit on all ranks.

        Args:
            hidden: the same on all ranks.
            out: where to write, of the result's shape and dtype, contiguous. None: a new tensor.
        """
        if self._group.size == 1:
            return self._own_logits(hidden, out)
        own = self._own_logits(hidden, None)
        if self._is_even:
            return self._group.all_gather(own, out)
        logits = self._group.all_gather(own)[:, : self._vocab_size]  # the rest are of rows that hold anything
        return logits.contiguous() if out is None else out.copy_(logits)

    def _own_logits(self, hidden: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._packed is not None:
            logits = packed_linear(hidden, self._packed, None)
            return logits if out is None else out.copy_(logits)
        weight = self._own_weight()
        tile = skinny_tile(hidden.shape[0], *weight.shape, weight.dtype, weight.device)
        if tile is not None:
            return skinny_linear(hidden, weight, tile, out=out)
        return F.linear(hidden, weight) if out is None else torch.mm(hidden, weight.t(), out=out)

    def _own_weight(self) -> torch.Tensor:
        weight = self.weight if self._tied is None else self._tied
        assert weight is not None
        return weight
