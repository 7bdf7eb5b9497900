"""Normalisations over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.context import LayerContext
from workers.layers.linear_methods.base import empty_parameter
from workers.ops.rms_norm import add_rms_norm, rms_norm
from workers.ops.weighted_sum import WeightedRows, add_weighted_rms_norm, summed
from workers.parallel.group import TensorParallelGroup


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Args:
        size: H.
        eps: added to the mean square.
        context: of the model.
        plus_one: multiply by 1 + w, w being what a checkpoint holds (Gemma). The sum is kept in float32, whatever the
            model's dtype: w is small.
    """

    def __init__(self, size: int, eps: float, context: LayerContext, *, plus_one: bool = False) -> None:
        super().__init__()
        dtype = torch.float32 if plus_one else context.dtype
        self.weight = empty_parameter(size, dtype=dtype, device=context.device)
        self.eps = eps
        self.plus_one = plus_one

    def process_weights(self) -> None:
        """Call once, after loading: adds the 1."""
        if self.plus_one:
            self.weight.add_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and scale; of the input's shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor | WeightedRows, residual: torch.Tensor) -> torch.Tensor:
        """`residual += summed(x)`, in place, and that normalised; for a contiguous residual."""
        if isinstance(x, WeightedRows):
            return add_weighted_rms_norm(x, residual, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation without a bias (Ba et al., 2016, arXiv:1607.06450), as Cohere's models have it.

    Args:
        size: H.
        eps: added to the variance.
        context: of the model.
    """

    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=context.dtype, device=context.device)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and scale, in float32, rounded once; of the input's shape and dtype."""
        normed: torch.Tensor = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), None, self.eps)
        return normed.to(x.dtype)

    def add(self, x: torch.Tensor | WeightedRows, residual: torch.Tensor) -> torch.Tensor:
        """`residual += summed(x)`, in place, and that normalised."""
        return self.forward(residual.add_(summed(x)))


class HeadNorm(nn.Module):
    """The weights by which each head of queries and keys is normalised before it is rotated, in one tensor.

    The rotation's kernel applies it, see `workers.ops.qk_norm_rope`.

    Args:
        num_heads: of queries and keys, of this rank.
        head_size: D.
        eps: added to the mean square.
        context: of the model.
        plus_one: see `RMSNorm`.
        weighted: whether there are weights to be loaded; else all are 1, and because a rotation changes no head's
            length the norm is the same before it and behind it (Llama-4).
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        eps: float,
        context: LayerContext,
        *,
        plus_one: bool = False,
        weighted: bool = True,
    ) -> None:
        super().__init__()
        dtype = torch.float32 if plus_one else context.dtype
        weight: torch.Tensor = empty_parameter(num_heads, head_size, dtype=dtype, device=context.device)
        self.weight = weight if weighted else nn.Buffer(torch.ones_like(weight), persistent=False)
        self.eps = eps
        self.plus_one = plus_one

    def process_weights(self) -> None:
        """See `RMSNorm.process_weights`."""
        if self.plus_one:
            self.weight.add_(1.0)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """(T, Hq + Hkv, D) normalised, each head by itself."""
        normed: torch.Tensor = F.rms_norm(heads.float(), heads.shape[-1:], None, self.eps) * self.weight.float()
        return normed.to(heads.dtype)


class WideNorm(nn.Module):
    """RMS normalisation of queries and of keys, each over the features of all their heads on all ranks (OLMo-2).

    Args:
        query_size: features of this rank's queries.
        key_size: features of this rank's keys. Several ranks may have the same ones: that changes no mean.
        eps: added to the mean square.
        context: of the model.

    Attributes:
        weight: (query_size + key_size,), those of queries first.
    """

    def __init__(self, query_size: int, key_size: int, eps: float, context: LayerContext) -> None:
        super().__init__()
        self.weight = empty_parameter(query_size + key_size, dtype=context.dtype, device=context.device)
        self.eps = eps
        self._sizes = (query_size, key_size)
        self._group: TensorParallelGroup = context.group

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, query_size) and (T, key_size) normalised, in float32, rounded once; ranks sum their squares together."""
        of_query, of_key = self.weight.split(self._sizes)
        if self._group.size == 1:
            return rms_norm(query, of_query, self.eps), rms_norm(key, of_key, self.eps)
        wide_query, wide_key = query.float(), key.float()
        means = torch.stack((wide_query.square().mean(-1), wide_key.square().mean(-1)), dim=-1)
        means = self._group.all_reduce(means) / self._group.size
        by_query, by_key = torch.rsqrt(means + self.eps).unsqueeze(1).unbind(-1)
        return (
            (wide_query * by_query * of_query.float()).to(query.dtype),
            (wide_key * by_key * of_key.float()).to(key.dtype),
        )
