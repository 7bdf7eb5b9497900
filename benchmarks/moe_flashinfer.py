"""FlashInfer's fused mixture of experts for SM 9.0 as `benchmarks.moe` runs it: its own kernels, its own sorting.

From 0.7.2 on `flashinfer.fused_moe.cute_dsl.cute_dsl_fused_moe_bf16`: weights of gate and up that take turns in blocks
of 32 rows, up first; no biases. Measured without its fused sum, which adds atomically and so never twice the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.moe_layers import MoELayerShape
from workers.layers.moe.block import MoEBlock

_BLOCK = 32
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
    try:
        from flashinfer.fused_moe.cute_dsl import cute_dsl_fused_moe_bf16
    except (ImportError, AttributeError, OSError, RuntimeError):
        return {}
    if shape.bias or shape.activation.kind != "silu" or shape.intermediate_size % _BLOCK:
        return {}
    weights = {block: block.experts.gate_up_proj.get_parameter("weight") for block in blocks}
    interleaved = {block: interleave(weight) for block, weight in weights.items()}

    def run(block: MoEBlock, x: torch.Tensor, *, tactic: Any) -> torch.Tensor:
        ids, scales = block.router(x)
        out: torch.Tensor = cute_dsl_fused_moe_bf16(
            x,
            ids.int(),
            scales,
            interleaved[block],
            block.experts.down_proj.weight,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            use_fused_finalize=False,
            tactic=tactic,
        )
        return out

    return {name: partial(run, tactic=tactic) for name, tactic in _TACTICS.items()}


def interleave(weight: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, H), gate above up, as blocks of rows in turn, up first."""
    gate, up = (half.unflatten(1, (-1, _BLOCK)) for half in weight.detach().chunk(2, dim=1))
    return torch.stack([up, gate], dim=2).flatten(1, 3)
