"""How the routers of the families choose, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError

Scores = Literal["softmax", "softmax_of_chosen", "sigmoid"]
GroupScore = Literal["max", "sum_of_two"]

SMALLEST_SUM = 1e-20
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
