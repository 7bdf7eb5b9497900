"""How the experts of a layer keep the weights of a projection (after vLLM's `FusedMoEMethodBase`).

A method makes the parameters that a loader fills, and turns them into what the grouped product reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from workers.layers.linear_methods.base import empty_parameter
from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.loading.mxfp4_numbers import Mxfp4Numbers


class GroupedLinearMethod(Protocol):
    """How one projection of all experts keeps its weights."""

    def create_weights(
        self, module: nn.Module, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register what a loader fills, uninitialised, as parameters of `module`.

        Args:
            module: the projection.
            shape: (E, M, K).
            bias: whether each expert has one.
            dtype: of activations.
            device: where they are.
        """

    def process_weights(self, module: nn.Module) -> None:
        """Bring the parameters, which are filled now, into the form that is multiplied with."""

    def weight(self, module: nn.Module, with_bias: bool) -> GroupedWeight:
        """What is multiplied with; it reads the parameters and copies nothing."""

    def kept(self, module: nn.Module) -> Mapping[str, Mxfp4Numbers]:
        """What quantised parameters mean that are filled and not processed, by the name of the plain parameter."""


class PlainGroupedLinear:
    """Weights in the dtype of the activations: `weight`, (E, M, K), and `bias`, (E, M)."""

    def create_weights(
        self, module: nn.Module, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register `weight`, and `bias` where there is one."""
        module.register_parameter("weight", empty_parameter(*shape, dtype=dtype, device=device))
        module.register_parameter("bias", empty_parameter(*shape[:2], dtype=dtype, device=device) if bias else None)

    def process_weights(self, module: nn.Module) -> None:
        """Nothing: they are multiplied with as they are."""

    def weight(self, module: nn.Module, with_bias: bool) -> GroupedWeight:
        """The parameters."""
        weight, bias = module.get_parameter("weight"), module._parameters["bias"]
        return PlainWeight(weight.detach(), None if bias is None or not with_bias else bias.detach())

    def kept(self, module: nn.Module) -> Mapping[str, Mxfp4Numbers]:
        """Nothing."""
        return {}


PLAIN = PlainGroupedLinear()
