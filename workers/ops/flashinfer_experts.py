"""FlashInfer's mixture of experts for SM 9.0: sorting, both products and the sum, in kernels of its own.

From 0.7.2 on `flashinfer.fused_moe.cute_dsl.cute_dsl_fused_moe_bf16`: weights of gate and up that take turns in blocks
of 32 rows, up first; SiLU; no biases. Used without its fused sum, which adds atomically and so never twice the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_BLOCK = 32


@functools.cache
def flashinfer_kernel() -> Callable[..., torch.Tensor] | None:
    """FlashInfer's function; None where there is none that can be imported."""
    try:
        from flashinfer.fused_moe import cute_dsl
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    return getattr(cute_dsl, "cute_dsl_fused_moe_bf16", None)


def interleave(weight: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, H), gate above up, as blocks of rows in turn, up first.

    Raises:
        ValueError: blocks do not divide I.
    """
    if weight.shape[1] % (2 * _BLOCK):
        raise ValueError(f"{weight.shape[1] // 2} features do not form blocks of {_BLOCK}")
    gate, up = (half.unflatten(1, (-1, _BLOCK)) for half in weight.chunk(2, dim=1))
    return torch.stack([up, gate], dim=2).flatten(1, 3)


def flashinfer_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    tactic: Any = None,
) -> torch.Tensor:
    """Each token through its experts, and their weighted sum.

    Args:
        x: (T, H) bfloat16 or float16, contiguous.
        ids: (T, k) integers.
        weights: (T, k) float32.
        gate_up: (E, 2 * I, H) of `interleave`.
        down: (E, H, I).
        tactic: FlashInfer's tiles; None: its default, or what it tuned.

    Returns:
        (T, H).

    Raises:
        RuntimeError: there is no such FlashInfer.
    """
    kernel = flashinfer_kernel()
    if kernel is None:
        raise RuntimeError("FlashInfer 0.7.2 or newer with its CuTe DSL kernels is not installed")
    num_experts, top_k = down.shape[0], ids.shape[1]
    return kernel(
        x,
        ids.int(),
        weights,
        gate_up,
        down,
        num_experts=num_experts,
        top_k=top_k,
        use_fused_finalize=False,
        tactic=tactic,
    )
