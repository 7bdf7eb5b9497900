"""Which experts each token goes to, and with what weight: the routers of the families as functions of the logits.

All compute in float32 whatever the logits' dtype, and none waits for the device. Equal scores are ordered as
`torch.topk` orders them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from workers.errors import ConfigError

Scores = Literal["softmax", "softmax_of_chosen", "sigmoid"]
GroupScore = Literal["max", "sum_of_two"]

_SMALLEST_SUM = 1e-20
"""Added to the sum of sigmoid scores before it divides, as DeepSeek-V3's published code does."""


@dataclass(frozen=True)
class RouterConfig:
    """How a family's router turns logits into a choice.

    Attributes:
        num_experts: E.
        top_k: experts of a token.
        scores: softmax over all experts (Mixtral, Qwen-MoE, DeepSeek-V2), softmax over the chosen ones alone (gpt-oss),
            or a sigmoid of each (Llama-4, DeepSeek-V3).
        renormalize: whether the chosen experts' weights are divided by their sum (`norm_topk_prob`).
        scaling_factor: what the weights are multiplied by (`routed_scaling_factor`).
        num_groups: equal groups that neighbouring experts form (`n_group`); 1: no groups.
        top_k_groups: groups that a token's experts are chosen from (`topk_group`).
        group_score: what a group is chosen by: its best expert (DeepSeek-V2's group_limited_greedy), or the sum of its
            two best (DeepSeek-V3's noaux_tc).
        weighs_input: whether the weight multiplies what the expert reads instead of what it writes (Llama-4).

    Raises:
        ConfigError: numbers that do not fit each other.
    """

    num_experts: int
    top_k: int
    scores: Scores = "softmax"
    renormalize: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: GroupScore = "max"
    weighs_input: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"{self.top_k} experts for each token of {self.num_experts}: needs 1 to all of them")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(f"{self.num_experts} experts do not form {self.num_groups} equal groups")
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise ConfigError(f"{self.top_k_groups} groups for each token of {self.num_groups}: needs 1 to all of them")
        if self.top_k > self.top_k_groups * self.experts_per_group:
            raise ConfigError(
                f"{self.top_k} experts for each token out of {self.top_k_groups} groups of {self.experts_per_group}: "
                "these are too few"
            )
        if self.limits_groups and self.scores == "softmax_of_chosen":
            raise ConfigError("a softmax over the chosen experts alone knows no groups of experts")
        if self.limits_groups and self.group_score == "sum_of_two" and self.experts_per_group < 2:
            raise ConfigError(f"groups of {self.experts_per_group} expert have no two best experts")

    @property
    def experts_per_group(self) -> int:
        """Experts in a group."""
        return self.num_experts // self.num_groups

    @property
    def limits_groups(self) -> bool:
        """Whether some groups are closed to a token."""
        return self.top_k_groups < self.num_groups


def route(
    logits: torch.Tensor, config: RouterConfig, correction_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights.

    Args:
        logits: (T, E), of any floating dtype.
        config: the family's router.
        correction_bias: (E,) `e_score_correction_bias`, for sigmoid scores: added for the choice, not in the weights
            (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Returns:
        (T, k) int64 ids, no two of a row the same, the best one first, and (T, k) float32 weights.

    Raises:
        ValueError: logits or a bias of another shape, or a bias for a router that has none.
    """
    if logits.dim() != 2 or logits.shape[1] != config.num_experts:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {config.num_experts} experts")
    if correction_bias is not None:
        if config.scores != "sigmoid":
            raise ValueError(f"a correction bias belongs to sigmoid scores, not to {config.scores}")
        if correction_bias.shape != logits.shape[1:]:
            raise ValueError(f"a correction bias of shape {tuple(correction_bias.shape)} for {logits.shape[1]} experts")
    logits = logits.float()
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
        weights = renormalize(weights, _SMALLEST_SUM if config.scores == "sigmoid" else 0.0)
    return ids, weights if config.scaling_factor == 1.0 else weights * config.scaling_factor


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
