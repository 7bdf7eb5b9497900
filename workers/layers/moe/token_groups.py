"""Pairs of a token and one of its experts, sorted by expert: what every grouped product works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenGroups:
    """T tokens with k experts each make N = T * k pairs; pair number t * k + j is token t with its j-th expert.

    Attributes:
        pairs: (N,) int32: the pairs' numbers, those of expert 0 first; of one expert in the order of their tokens.
        offsets: (E + 1,) int32: where in `pairs` each expert's begin; the last is N.
        top_k: k.
    """

    pairs: torch.Tensor
    offsets: torch.Tensor
    top_k: int

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.pairs.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def tokens(self) -> torch.Tensor:
        """(N,) int32: whose the pairs are, in the order of `pairs`."""
        return self.pairs // self.top_k


def group_tokens(ids: torch.Tensor, num_experts: int) -> TokenGroups:
    """Sort the pairs by expert; on a GPU without waiting for it.

    Args:
        ids: (T, k) of an integer dtype, each from 0 to `num_experts` - 1.
        num_experts: E.

    Raises:
        ValueError: ids that are no matrix of integers, or on the CPU one that is no expert.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids of {ids.dtype} {tuple(ids.shape)}: needs (tokens, experts of a token) int32 or int64")
    if ids.is_cuda:
        from workers.ops.triton.token_groups import MAX_SORTED_PAIRS, launch_group_tokens

        if ids.numel() <= MAX_SORTED_PAIRS:
            return TokenGroups(*launch_group_tokens(ids, num_experts), ids.shape[1])
    elif ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(f"expert ids from {int(ids.min())} to {int(ids.max())} of {num_experts} experts")
    return group_tokens_torch(ids, num_experts)


def group_tokens_torch(ids: torch.Tensor, num_experts: int) -> TokenGroups:
    """`group_tokens` in plain torch, on any device."""
    experts, pairs = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=ids.device)
    offsets = torch.searchsorted(experts, bounds, out_int32=True)
    return TokenGroups(pairs.int(), offsets, ids.shape[1])
