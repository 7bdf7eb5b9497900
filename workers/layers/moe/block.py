"""Router, experts and shared experts of one layer."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.errors import ConfigError
from workers.layers.moe.experts import Experts
from workers.layers.moe.routing import route
from workers.ops.router_config import RouterConfig
from workers.ops.weighted_sum import WeightedRows, summed


class Router(nn.Module):
    """The linear map that scores experts, whole on every rank, and the choice by its scores.

    Args:
        config: the family's router.
        hidden_size: H.
        dtype: of its weight and of activations.
        device: where it is.
        bias: whether the map has one (gpt-oss).
        corrected: whether there is an `e_score_correction_bias`, which is kept in float32 (DeepSeek-V3).
        in_float32: whether the map is computed in float32 whatever the dtype (DeepSeek).
        num_shared: S experts before those that are chosen from, which every token goes to.
        shared_gate: whether these are weighed with `sigmoid(gate(x))` (Qwen2-MoE): the weight's last row.

    Raises:
        ConfigError: a gate of no shared experts, or beside a bias.
    """

    def __init__(
        self,
        config: RouterConfig,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bias: bool = False,
        corrected: bool = False,
        in_float32: bool = False,
        num_shared: int = 0,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        if shared_gate and (bias or num_shared == 0):
            raise ConfigError(
                f"a gate of {num_shared} shared experts {'beside' if bias else 'without'} a router's bias"
            )
        self.config = config
        self.num_shared = num_shared
        self._in_float32 = in_float32
        self.weight = _empty(
            (config.num_experts + shared_gate, hidden_size), torch.float32 if in_float32 else dtype, device
        )
        self.bias = _empty((config.num_experts,), self.weight.dtype, device) if bias else None
        self.e_score_correction_bias = _empty((config.num_experts,), torch.float32, device) if corrected else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, H) to (T, k + S) int64 ids of experts and (T, k + S) float32 weights; the shared ones are the first."""
        return route(self.logits(x), self.config, self.e_score_correction_bias, self.num_shared)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, E), with a gate of shared experts (T, E + 1); on a GPU float32."""
        if x.is_cuda:
            from workers.ops.triton.router_logits import computes, launch_router_logits

            if computes(x, self.weight):
                logits = torch.empty(x.shape[0], self.weight.shape[0], dtype=torch.float32, device=x.device)
                launch_router_logits(logits, x, self.weight, self.bias)
                return logits
        return F.linear(x.float() if self._in_float32 else x, self.weight, self.bias)


class PartialMLP(Protocol):
    """An MLP that the ranks of a group share out among them."""

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H): this rank's summand."""
        ...


class SharedExpert(nn.Module):
    """What every token goes through beside its experts, optionally times `sigmoid(gate(x))` (Qwen2-MoE).

    Args:
        mlp: a module.
        hidden_size: H.
        gated: whether there is a gate.
        dtype: of the gate's weight.
        device: where it is.
    """

    def __init__(
        self, mlp: PartialMLP, hidden_size: int, gated: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate_weight = _empty((1, hidden_size), dtype, device) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H); a partial sum stays one, because the gate is the same on every rank."""
        out = self.mlp.partial(x)
        return out if self.gate_weight is None else torch.sigmoid(F.linear(x, self.gate_weight)) * out


class MoEBlock(nn.Module):
    """A layer's MLP as a mixture of experts.

    Args:
        router: which experts.
        experts: what they compute.
        shared_expert: what all tokens go through; None: nothing.
    """

    def __init__(self, router: Router, experts: Experts, shared_expert: SharedExpert | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) to (T, H): on one of several ranks its partial sum, which the caller reduces."""
        return summed(self.summands(x))

    def summands(self, x: torch.Tensor) -> torch.Tensor | WeightedRows:
        """`forward`'s result, or what sums up to it."""
        ids, weights = self.router(x)
        shared = None if self.shared_expert is None else self.shared_expert(x)
        return self.experts.summands(x, ids, weights, weighs_input=self.router.config.weighs_input, added=shared)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
