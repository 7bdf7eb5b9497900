"""The experts of one layer: two grouped products with a gated activation between, and the sum over a token's experts.

A product belongs to a method (`grouped_method.py`): a format that stays quantised in memory is one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from workers.layers.activation import GatedActivation
from workers.layers.moe.chosen_experts_sum import chosen_experts_sum, sums_chosen
from workers.layers.moe.grouped_linear import grouped_linear
from workers.layers.moe.grouped_method import PLAIN, GroupedLinearMethod
from workers.layers.moe.grouped_weight import GroupedWeight
from workers.layers.moe.token_groups import group_tokens
from workers.loading.mxfp4_numbers import Mxfp4Numbers
from workers.ops.weighted_sum import WeightedRows


class GroupedLinear(nn.Module):
    """One projection of all experts.

    Args:
        shape: (E, M, K).
        bias: whether each expert has one.
        dtype: of activations.
        device: where it is.
        method: how it keeps its weights.
        adds_bias: whether this rank adds the bias, which every rank has.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        method: GroupedLinearMethod = PLAIN,
        adds_bias: bool = True,
    ) -> None:
        super().__init__()
        self._method, self._adds_bias = method, adds_bias
        self._processed: GroupedWeight | None = None
        method.create_weights(self, shape, bias, dtype, device)

    def process_weights(self) -> None:
        """Call after loading; after this no weights can be loaded."""
        self._method.process_weights(self)
        self._processed = self._method.weight(self, self._adds_bias)

    def named_numbers(self) -> Mapping[str, nn.Parameter | Mxfp4Numbers]:
        """Parameters by name; of such as are kept quantised what they mean, as if they were plain."""
        kept = self._method.kept(self)
        own = {} if kept else {"weight": self.get_parameter("weight")}
        bias = self._parameters["bias"]
        return {**own, **kept, **({} if bias is None else {"bias": bias})}

    def all_experts(self) -> GroupedWeight:
        """What `grouped_linear` multiplies with."""
        return self._processed or self._method.weight(self, self._adds_bias)


class Experts(nn.Module):
    """All experts of a layer; of several ranks each computes with its share of every expert's inner dimension.

    `gate_up_proj.weight` is (E, 2 * I, H), gate above up, and `down_proj.weight` (E, H, I). A checkpoint that keeps
    gate and up interleaved, or matrices the other way around (gpt-oss, Llama-4), is rearranged while it is loaded
    (`workers.loading.expert_weights`).

    Args:
        num_experts: E, the shared ones among them.
        hidden_size: H.
        intermediate_size: I, this rank's share.
        activation: between the products.
        dtype: of activations.
        device: where they are.
        bias: whether both projections have one (gpt-oss).
        rank: of the ranks that share the layer: rank 0 alone adds the second bias, because their results are summed.
        method: how the weights are kept.
        num_shared: how many experts, the first ones, every token goes to.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GatedActivation,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bias: bool = False,
        rank: int = 0,
        method: GroupedLinearMethod = PLAIN,
        num_shared: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_shared = num_shared
        self.activation = activation
        inner, outer = (num_experts, 2 * intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size)
        self.gate_up_proj = GroupedLinear(inner, bias, dtype, device, method)
        self.down_proj = GroupedLinear(outer, bias, dtype, device, method, adds_bias=rank == 0)

    def process_weights(self) -> None:
        """Call after loading; after this no weights can be loaded."""
        self.gate_up_proj.process_weights()
        self.down_proj.process_weights()

    def summands(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        weighs_input: bool = False,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor | WeightedRows:
        """Each token through its experts; what they made of it need not be summed up yet.

        Args:
            x: (T, H), the elements of a row contiguous.
            ids: (T, k) integers, the tokens' experts.
            weights: (T, k) float32.
            weighs_input: whether a weight multiplies what its expert reads, not what it writes (Llama-4).
            added: (T, H), added to the sum before it is rounded: this rank's share of what shared experts computed.

        Returns:
            (T, H), or what sums up to it: on one of several ranks its partial sum, which the caller reduces.

        Raises:
            ValueError: arguments that do not fit each other.
        """
        top_k = ids.shape[-1]
        if ids.shape != (x.shape[0], top_k) or weights.shape != ids.shape:
            raise ValueError(
                f"ids of shape {tuple(ids.shape)} and weights of {tuple(weights.shape)} for {x.shape[0]} tokens"
            )
        if x.shape[0] == 0:
            return torch.empty_like(x)
        groups = group_tokens(ids, self.num_experts, self.num_shared)
        if weighs_input:
            x = (x[:, None] * weights.to(x.dtype)[..., None]).flatten(0, 1)
        down, out_weights = self.down_proj.all_experts(), None if weighs_input else weights
        # One token's pairs need no order: nothing has to be sorted.
        order: Literal["pairs", "sorted"] = "pairs" if x.shape[0] == 1 else "sorted"
        inner = grouped_linear(
            x,
            self.gate_up_proj.all_experts(),
            groups,
            rows="pairs" if weighs_input else "tokens",
            out_rows=order,
            activation=self.activation,
        )
        if sums_chosen(down, x.shape[0], top_k):
            return chosen_experts_sum(inner, down, ids, out_weights, added)
        outer = grouped_linear(inner, down, groups, rows=order, out_rows="pairs", routed_before=True)
        return WeightedRows(outer, top_k, out_weights, added)
