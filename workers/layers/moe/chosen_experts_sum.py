"""The experts' second product and the sum over a token's experts as one, for tokens that share no expert."""

from __future__ import annotations

import torch

from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.ops.sum_tiles import USUAL, SumTile, sums_faster

_MOST_TOKENS = 1


def sums_chosen(weight: GroupedWeight, num_tokens: int, top_k: int) -> bool:
    """Whether a kernel does both, and is the fastest for so many tokens and experts of each."""
    if num_tokens > _MOST_TOKENS or not isinstance(weight, PlainWeight) or weight.device.type != "cuda":
        return False
    return sums_faster(weight.shape[1], top_k)


def chosen_experts_sum(
    x: torch.Tensor,
    weight: GroupedWeight,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    added: torch.Tensor | None = None,
    tile: SumTile = USUAL,
) -> torch.Tensor:
    """`sum_j weights[t, j] * linear(expert ids[t, j], x[t * k + j]) + added[t]`, rounded once.

    Args:
        x: (T * k, K), of the weight's dtype, contiguous.
        weight: (E, M, K) of all experts; as `sums_chosen` says.
        ids: (T, k) integers.
        weights: (T, k) float32; None: all 1.
        added: (T, M) of x's dtype.
        tile: of the kernel.

    Returns:
        (T, M) of x's dtype.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _, num_outputs, num_inputs = weight.shape
    if x.shape != (ids.numel(), num_inputs) or x.dtype != weight.dtype or not x.is_contiguous():
        raise ValueError(
            f"x of {x.dtype} {tuple(x.shape)} with strides {x.stride()}: needs contiguous rows of {weight.dtype} "
            f"{(ids.numel(), num_inputs)}"
        )
    if weights is not None and (weights.shape != ids.shape or weights.dtype != torch.float32):
        raise ValueError(f"weights of {weights.dtype} {tuple(weights.shape)}: needs float32 {tuple(ids.shape)}")
    out = x.new_empty(ids.shape[0], num_outputs)
    if added is not None and (added.shape != out.shape or added.dtype != x.dtype):
        raise ValueError(f"{added.dtype} {tuple(added.shape)} to be added to {x.dtype} {tuple(out.shape)}")
    if not isinstance(weight, PlainWeight) or not x.is_cuda:
        raise ValueError(f"no kernel for {weight} on {x.device.type}")
    from workers.ops.triton.chosen_experts_sum import launch_chosen_experts_sum

    launch_chosen_experts_sum(
        out,
        x,
        weight.weight,
        ids.contiguous(),
        None if weights is None else weights.contiguous(),
        bias=weight.bias,
        added=None if added is None else added.contiguous(),
        tile=tile,
    )
    return out
