"""What the modules of a model have in common when they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.layers.linear_methods.base import LinearMethod
from workers.parallel.group import TensorParallelGroup


@dataclass(frozen=True)
class LayerContext:
    """Where a model's modules are, in what, and with whom they are shared.

    Attributes:
        dtype: of weights and activations.
        device: where they are.
        group: the ranks that share every layer.
        linear_method: of the projections.
        experts_in_mxfp4: whether experts are kept so.
    """

    dtype: torch.dtype
    device: torch.device
    group: TensorParallelGroup
    linear_method: LinearMethod
    experts_in_mxfp4: bool = False
