"""Which experts each token goes to, and with what weight: the routers of the families as functions of the logits.

All compute in float32 whatever the logits' dtype, and none waits for the device. On a GPU one kernel does it all, for
which of equal scores that of the smaller number is the larger one; elsewhere they are ordered as by `torch.topk`.
"""

from __future__ import annotations

import torch

from workers.ops.router_config import SMALLEST_SUM, RouterConfig


def route(
    logits: torch.Tensor, config: RouterConfig, correction_bias: torch.Tensor | None = None, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights.

    Args:
        logits: (T, E), of any floating dtype; with a gate of the shared experts (T, E + 1), its logits last.
        config: the family's router.
        correction_bias: (E,) `e_score_correction_bias`, for sigmoid scores: added for the choice, not in the weights
            (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
        num_shared: S experts before the E, which every token goes to: with weight 1, or the sigmoid of the gate. They
            have the numbers 0 to S - 1.

    Returns:
        (T, S + k) int64 ids, no two of a row the same, first the shared ones and then the best, and (T, S + k) float32
        weights.

    Raises:
        ValueError: logits or a bias of another shape, or a bias for a router that has none.
    """
    num_experts, gated = config.num_experts, num_shared > 0 and logits.shape[-1] == config.num_experts + 1
    if logits.dim() != 2 or logits.shape[1] != num_experts + gated:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {num_experts} experts")
    if correction_bias is not None:
        if config.scores != "sigmoid":
            raise ValueError(f"a correction bias belongs to sigmoid scores, not to {config.scores}")
        if correction_bias.shape != (num_experts,):
            raise ValueError(f"a correction bias of shape {tuple(correction_bias.shape)} for {num_experts} experts")
    if logits.is_cuda:
        from workers.ops.triton.routing import MAX_EXPERTS, launch_route

        if num_experts <= MAX_EXPERTS:
            chosen = logits.shape[0], config.top_k + num_shared
            ids = torch.empty(chosen, dtype=torch.int64, device=logits.device)
            weights = torch.empty(chosen, dtype=torch.float32, device=logits.device)
            launch_route(ids, weights, logits.contiguous(), config, correction_bias, num_shared)
            return ids, weights
    return route_torch(logits, config, correction_bias, num_shared)


def route_torch(
    logits: torch.Tensor, config: RouterConfig, correction_bias: torch.Tensor | None = None, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in plain torch, on any device."""
    logits = logits.float()
    gates = logits[:, config.num_experts :].sigmoid()
    logits = logits[:, : config.num_experts]
    if config.scores == "softmax_of_chosen":
        ids, weights = top_k_then_softmax(logits, config.top_k)
    elif config.scores == "softmax":
        scores = logits.softmax(dim=-1)
        ids, weights = choose(scores, scores, config)
    else:
        scores = logits.sigmoid()
        # Far from zero sigmoids are equal in float32 where logits still differ: without a bias these decide.
        ids, weights = choose(scores, _sigmoid_keys(logits, scores, config, correction_bias), config)
    if config.renormalize and config.scores != "softmax_of_chosen":
        weights = renormalize(weights, SMALLEST_SUM if config.scores == "sigmoid" else 0.0)
    if config.scaling_factor != 1.0:
        weights = weights * config.scaling_factor
    if num_shared == 0:
        return ids, weights
    shared = torch.arange(num_shared, device=ids.device)
    shared_weights = gates if gates.shape[1] else torch.ones_like(weights[:, :1])
    ids = torch.cat([shared.expand(ids.shape[0], -1), ids + num_shared], dim=1)
    return ids, torch.cat([shared_weights.expand(-1, num_shared), weights], dim=1)


def top_k_then_softmax(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the largest of (T, E) float32 logits, and the softmax over these alone (gpt-oss)."""
    best, ids = logits.topk(top_k, dim=-1)
    return ids, best.softmax(dim=-1)


def choose(scores: torch.Tensor, keys: torch.Tensor, config: RouterConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the largest keys, of the groups that are open to the token, and their scores.

    Args:
        scores: (T, E) float32, which become weights.
        keys: (T, E) float32, which the choice is made by.
        config: the family's router.
    """
    if config.limits_groups:
        keys = keys.masked_fill(_closed(keys, config), float("-inf"))
    best, ids = keys.topk(config.top_k, dim=-1)
    return ids, best if keys is scores else scores.gather(1, ids)


def renormalize(weights: torch.Tensor, smallest_sum: float = 0.0) -> torch.Tensor:
    """Weights, (T, k), that sum to 1 for each token."""
    return weights / (weights.sum(dim=-1, keepdim=True) + smallest_sum)


def _sigmoid_keys(
    logits: torch.Tensor, scores: torch.Tensor, config: RouterConfig, correction_bias: torch.Tensor | None
) -> torch.Tensor:
    if correction_bias is not None:
        return scores + correction_bias.float()
    return scores if config.limits_groups else logits


def _closed(keys: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """(T, E) bool: the experts whose group is not among the token's."""
    grouped = keys.unflatten(1, (config.num_groups, config.experts_per_group))
    best = grouped.topk(1 if config.group_score == "max" else 2, dim=-1).values
    group_keys = best.sum(dim=-1)
    open_groups = group_keys.topk(config.top_k_groups, dim=-1).indices
    closed = torch.ones_like(group_keys, dtype=torch.bool).scatter_(1, open_groups, False)
    return closed.repeat_interleave(config.experts_per_group, dim=1)
