"""FlashInfer's mixture of experts as `benchmarks.moe` runs it, with some of its tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.moe_layers import MoELayerShape
from workers.layers.moe.block import MoEBlock
from workers.ops.flashinfer_experts import flashinfer_experts, flashinfer_kernel, interleave

_TACTICS: Mapping[str, Any] = {
    "default": None,
    "128x128": (128, ((128, 128), 8), ((128, 128), (1, 2), False)),
    "128x256": (128, ((128, 256), 8), ((128, 256), (1, 1), False)),
    "64x128": (64, ((64, 128), 1), ((64, 128), (1, 1), False)),
}


def flashinfer_candidates(
    shape: MoELayerShape, blocks: Sequence[MoEBlock]
) -> dict[str, Callable[[MoEBlock, torch.Tensor], torch.Tensor]]:
    """By tactic a function like `run_block`; empty where this FlashInfer has no such kernel, or not for this layer."""
    if flashinfer_kernel() is None or shape.bias or shape.activation.kind != "silu":
        return {}
    weights = {block: block.experts.gate_up_proj.get_parameter("weight").detach() for block in blocks}
    interleaved = {block: interleave(weight) for block, weight in weights.items()}

    def run(block: MoEBlock, x: torch.Tensor, *, tactic: Any) -> torch.Tensor:
        ids, scales = block.router(x)
        down = block.experts.down_proj.get_parameter("weight").detach()
        return flashinfer_experts(x, ids, scales, interleaved[block], down, tactic)

    return {name: partial(run, tactic=tactic) for name, tactic in _TACTICS.items()}
