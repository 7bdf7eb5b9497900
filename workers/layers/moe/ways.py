"""Which way a grouped product is computed by, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch

Way = Literal["loop", "torch", "triton"]
"""An expert at a time with the device's own product; PyTorch's grouped product; the Triton kernel."""

WAYS: Mapping[str, Sequence[tuple[int, Sequence[Way]]]] = MappingProxyType(
    {
        "cuda": ((1, ("triton", "torch", "loop")),),
        "cpu": ((1, ("loop",)),),
    }
)
"""By type of device: from how many tokens on which ways are preferred, the best first. The kernel takes
49 % to 86 % of the time of PyTorch's product for 64 tokens and more on an H200 (benchmarks/results/moe_h200.json), and
reads and writes rows where they are."""


def way_for(num_tokens: int, usable: Sequence[Way], device: torch.device) -> Way:
    """The first way that is preferred for so many tokens and can be used; `loop` where nothing is known."""
    chosen: Way = "loop"
    for begin, ways in WAYS.get(device.type, ()):
        if num_tokens >= begin:
            chosen = next((way for way in ways if way in usable), "loop")
    return chosen
