"""A mixture of experts in place of a decoder layer's MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.layers.activation import GatedActivation
from workers.layers.context import LayerContext
from workers.layers.gated_mlp import GatedMLP
from workers.layers.moe.block import MoEBlock, Router, SharedExpert
from workers.layers.moe.experts import Experts
from workers.layers.moe.grouped_method import PLAIN
from workers.layers.moe.mxfp4 import MXFP4
from workers.layers.residual import ResidualStream
from workers.ops.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture of a layer, of the whole model.

    Attributes:
        router: how a token's experts are chosen.
        intermediate_size: inner features of an expert.
        shared_intermediate_size: of what all tokens go through; 0: there is no such.
        shared_gate: whether that is weighed with `sigmoid(gate(x))`.
        router_bias: whether the router's map has a bias.
        expert_bias: whether both projections of the experts have one.
        router_corrected: whether there is an `e_score_correction_bias`.
        router_in_float32: whether the router's map is computed in float32.
    """

    router: RouterConfig
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    router_corrected: bool = False
    router_in_float32: bool = False

    @property
    def num_shared(self) -> int:
        """Experts that all tokens go through, before those that they choose from and of the same kind.

        What all go through is so many experts where its size is a multiple of an expert's: then it takes no products of
        its own. 0: it is an MLP, or there is no such.
        """
        if self.expert_bias or self.shared_intermediate_size % self.intermediate_size:
            return 0
        return self.shared_intermediate_size // self.intermediate_size

    @property
    def features(self) -> int:
        """Inner features that a token goes through: of its chosen experts together, and of the shared ones."""
        return self.router.top_k * self.intermediate_size + self.shared_intermediate_size


class MoEMLP(MoEBlock):
    """Router, experts and shared experts of a layer; every rank holds a part of each expert's inner features.

    Args:
        hidden_size: H.
        config: of the whole model.
        activation: of experts and shared experts.
        context: of the model.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, activation: GatedActivation, context: LayerContext) -> None:
        group, dtype, device = context.group, context.dtype, context.device
        router = Router(
            config.router,
            hidden_size,
            dtype,
            device,
            bias=config.router_bias,
            corrected=config.router_corrected,
            in_float32=config.router_in_float32,
            num_shared=config.num_shared,
            shared_gate=config.shared_gate and config.num_shared > 0,
        )
        experts = Experts(
            config.router.num_experts + config.num_shared,
            hidden_size,
            config.intermediate_size // group.size,
            activation,
            dtype,
            device,
            bias=config.expert_bias,
            rank=group.rank,
            method=MXFP4 if context.experts_in_mxfp4 else PLAIN,
            num_shared=config.num_shared,
        )
        shared = None
        if config.shared_intermediate_size and not config.num_shared:
            mlp = GatedMLP(hidden_size, config.shared_intermediate_size // group.size, context, activation=activation)
            shared = SharedExpert(mlp, hidden_size, config.shared_gate, dtype, device)
        super().__init__(router, experts, shared)
        self._group = group

    def add_to(self, stream: ResidualStream, x: torch.Tensor) -> None:
        """Add what it makes of (T, H), the normalised stream, to the stream: the same on all ranks."""
        stream.add(self.summands(x) if self._group.size == 1 else self._group.all_reduce(self(x)))
