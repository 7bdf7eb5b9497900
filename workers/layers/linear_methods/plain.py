"""Weights in the dtype of the activations, as the checkpoint has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.linear_methods.base import LinearMethod, Projection, empty_parameter
from workers.ops.gated_linear import gated_linear
from workers.ops.skinny_linear import skinny_gated_linear, skinny_linear, skinny_split_linear
from workers.ops.skinny_tiles import skinny_tile, split_tile
from workers.ops.weighted_sum import WeightedRows


class PlainLinear(LinearMethod):
    """A kernel of Baton's own for few rows where the table of measured shapes has a tile, cuBLAS for the rest."""

    def create_weights(
        self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register `weight`."""
        weight = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        module.register_parameter("weight", weight)

    def apply(
        self,
        module: Projection,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `LinearMethod.apply`."""
        weight = module.weight
        assert weight is not None
        tile = skinny_tile(x.shape[0], *weight.shape, weight.dtype, weight.device)
        if tile is not None:
            return skinny_linear(x, weight, tile, bias=bias, residual=residual, out=residual if out is None else out)
        if residual is not None:
            if x.is_cuda and bias is None:  # cuBLAS adds before the result is rounded, and needs no copy to add to
                return torch.addmm(residual, x, weight.t(), out=residual)
            return residual + F.linear(x, weight, bias)
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)

    def apply_gated(self, module: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """See `LinearMethod.apply_gated`: for few rows and for many."""
        weight = module.weight
        assert weight is not None
        tile = skinny_tile(x.shape[0], *weight.shape, weight.dtype, weight.device, gated=True)
        return gated_linear(x, weight) if tile is None else skinny_gated_linear(x, weight, tile)

    def apply_split(self, module: Projection, x: torch.Tensor, bias: torch.Tensor | None) -> WeightedRows | None:
        """See `LinearMethod.apply_split`: for few rows."""
        weight = module.weight
        assert weight is not None
        tile = split_tile(x.shape[0], *weight.shape, weight.dtype, weight.device)
        return None if tile is None else skinny_split_linear(x, weight, tile, bias)
