"""Experts with equal work, without a loss for it: the bias of each is moved (arXiv:2408.15664)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BIAS = "e_score_correction_bias"


class ExpertBalance:
    """Counts how many tokens each expert gets and moves its bias against that.

    The bias counts for the choice of the experts and not for their weights; gradients do not reach it.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Watch all routers of the model that have a bias; there may be none.

        Args:
            model: the model; its routers give (logits, weights, indices of the chosen experts).
            rate: what a bias is moved by at a step.
        """
        self.rate = rate
        self.routers = {name: router for name, router in model.named_modules() if hasattr(router, _BIAS)}
        self.loads: dict[str, Tensor] = {}
        for name, router in self.routers.items():
            router.register_forward_hook(self._counter(name))

    def _counter(self, name: str) -> Any:
        def count(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if router.training:
                experts = len(getattr(router, _BIAS))
                self.loads[name] = torch.nn.functional.one_hot(output[2].flatten(), experts).sum(0).float()

        return count

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Move the biases by what the last forward pass counted.

        Args:
            scale: of the rate; falls with the learning rate.
        """
        for name, load in self.loads.items():
            bias: Tensor = getattr(self.routers[name], _BIAS)
            bias += self.rate * scale * torch.sign(load.mean() - load)

    def shares(self) -> list[list[float]]:
        """Return the share of the last pass's choices that each expert of each router got."""
        return [[round(share, 3) for share in (load / load.sum()).tolist()] for load in self.loads.values()]
