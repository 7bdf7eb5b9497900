"""Which linear method a model's projections use."""

from __future__ import annotations

import torch

from workers.layers.linear_methods.base import LinearMethod
from workers.layers.linear_methods.onednn import OneDnnLinear
from workers.layers.linear_methods.plain import PlainLinear


def linear_method_for(device: torch.device) -> LinearMethod:
    """The one for weights that are not quantised."""
    return OneDnnLinear() if device.type == "cpu" else PlainLinear()
