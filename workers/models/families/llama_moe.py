"""Llama's layers with mixtures of experts in place of some or all of their MLPs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from workers.layers.context import LayerContext
from workers.layers.gated_mlp import GatedMLP
from workers.layers.latent_attention import LatentAttention
from workers.layers.moe.mlp import MoEConfig, MoEMLP
from workers.layers.norm import RMSNorm
from workers.layers.residual import ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch, SelfAttention
from workers.loading.config_reader import ConfigReader
from workers.loading.expert_weights import DOWN, GATE_UP, ExpertSizes, expert_by_expert, fused
from workers.loading.stored_tensor import whole
from workers.loading.weight_target import WeightTarget
from workers.models.config.model_config import ModelConfig
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM, make_self_attention
from workers.models.weight_map import Share, WeightMap


@dataclass(frozen=True, kw_only=True)
class LlamaMoEConfig(LlamaConfig):
    """A model of Llama's layers of which some have experts; `intermediate_size` is what a token goes through in these.

    Attributes:
        moe: of the layers that have experts.
        is_sparse: of each layer, whether it has.
        dense_intermediate_size: of the MLPs of the others.
    """

    moe: MoEConfig
    is_sparse: tuple[bool, ...]
    dense_intermediate_size: int = 0

    def shared_out(self) -> Mapping[str, int]:
        """See `ModelConfig.shared_out`."""
        sizes: dict[str, int] = {}
        if any(self.is_sparse):
            sizes["experts' intermediate size"] = self.moe.intermediate_size
            sizes["shared expert's intermediate size"] = self.moe.shared_intermediate_size
        if not all(self.is_sparse):
            sizes["intermediate size of layers without experts"] = self.dense_intermediate_size
        return sizes

    def expert_sizes(self, weights: WeightMap) -> ExpertSizes:
        """The experts of a layer, as the rank of `weights` holds them."""
        moe = self.moe
        inner = moe.intermediate_size
        return ExpertSizes(
            moe.router.num_experts, self.hidden_size, inner, weights.rank, weights.size, first=moe.num_shared
        )


class MoELayer(nn.Module):
    """Attention and an MLP or a mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: LlamaMoEConfig,
        self_attention: SelfAttention | LatentAttention,
        mlp: GatedMLP | MoEMLP,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, context)
        self.self_attention = self_attention
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_eps, context)
        self.mlp = mlp

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        attended = self.self_attention(stream.normalized(self.input_norm), batch)
        stream.add_product(self.self_attention.o_proj, attended)
        self.mlp.add_to(stream, stream.normalized(self.post_attention_norm))


class LlamaMoEForCausalLM(LlamaForCausalLM):
    """What differs from Llama by the fields of `LlamaMoEConfig`."""

    config: LlamaMoEConfig
    mlp_name: ClassVar[str] = "mlp"
    """What a layer's MLP is called in a checkpoint."""

    def make_layer(self, index: int, attention: Any, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        own = self.make_self_attention(index, attention, rotation)
        return MoELayer(self.config, own, self.make_mlp(index), self.context)

    def make_self_attention(self, index: int, attention: Any, rotation: Rotation) -> SelfAttention | LatentAttention:
        """The attention of a layer with its projections; arguments as of `CausalLM.make_layer`."""
        return make_self_attention(self.config, attention, rotation, self.context)

    def make_mlp(self, index: int) -> GatedMLP | MoEMLP:
        """The MLP of a layer, or its mixture of experts."""
        config, context = self.config, self.context
        if config.is_sparse[index]:
            return MoEMLP(config.hidden_size, config.moe, config.activation, context)
        inner = config.dense_intermediate_size // context.group.size
        return GatedMLP(config.hidden_size, inner, context, activation=config.activation)

    @classmethod
    def map_mlp(cls, config: ModelConfig, weights: WeightMap, index: int, theirs: str, ours: str) -> None:
        """See `LlamaForCausalLM.map_mlp`."""
        assert isinstance(config, LlamaMoEConfig)
        if config.is_sparse[index]:
            cls.map_experts(config, weights, theirs, ours)
        else:
            inner = config.dense_intermediate_size
            weights.gated_mlp(f"{theirs}.{cls.mlp_name}", f"{ours}.mlp", config.hidden_size, inner)

    @classmethod
    @abstractmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """Enter the tensors of a layer's router, experts and shared experts; arguments as of `map_mlp`."""


def map_router(config: LlamaMoEConfig, weights: WeightMap, name: str, ours: str) -> None:
    """Enter a router's map, `{name}.weight`, and its bias where it has one; `ours` is the layer in the model."""
    moe = config.moe
    rows = Share.all(moe.router.num_experts)
    weights.matrix(name, f"{ours}.mlp.router", rows, config.hidden_size, bias=moe.router_bias)


def map_expert_matrices(config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
    """Enter the experts of `{theirs}.mlp`: one by one, as published, or fused, as transformers saves them."""
    sizes, one_by_one, together = config.expert_sizes(weights), weights.like(), weights.like()
    one_by_one.extend(expert_by_expert(sizes), theirs, ours)
    together.extend(fused(sizes), theirs, ours)
    weights.one_of(one_by_one, together)


def map_shared_experts(
    config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str, name: str, gate: str = ""
) -> None:
    """Enter what all tokens go through: before the other experts, or as an MLP (`MoEConfig.num_shared`).

    Args:
        config: of the model.
        weights: to enter it in.
        theirs: the layer in a checkpoint.
        ours: the layer in the model.
        name: what a layer of a checkpoint calls it.
        gate: what it calls its gate, without `.weight`; empty: there is none.
    """
    moe, hidden = config.moe, config.hidden_size
    size, sizes, num_experts = moe.shared_intermediate_size, config.expert_sizes(weights), moe.router.num_experts
    if not moe.num_shared:
        weights.gated_mlp(f"{theirs}.{name}", f"{ours}.mlp.shared_expert.mlp", hidden, size)
        if gate:
            target = WeightTarget("mlp.shared_expert.gate_weight", (1, hidden), whole((1, hidden)), 0, 1)
            weights.extend({f"{gate}.weight": target}, theirs, ours)
        return
    for i in range(moe.num_shared):
        own = Share(size, *(i * moe.intermediate_size + bound for bound in sizes.own))
        index, gate_up, down = (i,), f"{ours}.mlp.experts.{GATE_UP}", f"{ours}.mlp.experts.{DOWN}"
        weights.matrix(f"{theirs}.{name}.gate_proj", gate_up, own, hidden, index=index)
        weights.matrix(f"{theirs}.{name}.up_proj", gate_up, own, hidden, begin=sizes.share, index=index)
        weights.matrix(f"{theirs}.{name}.down_proj", down, Share.all(hidden), own, index=index)
    if gate:
        weights.matrix(f"{theirs}.{gate}", f"{ours}.mlp.router", Share.all(1), hidden, begin=num_experts)


def read_num_experts(read: ConfigReader) -> int:
    """How many experts a layer has, by either of the names that transformers has for it.

    Raises:
        CheckpointError: there is none, or not a positive number; names file and key.
    """
    key = "num_experts" if read.get("num_experts") is not None else "num_local_experts"
    return read.positive_int(key)


def read_top_k(read: ConfigReader, num_experts: int) -> int:
    """How many experts a token goes to.

    Raises:
        CheckpointError: not a number from 1 to `num_experts`; names file and key.
    """
    top_k = read.positive_int("num_experts_per_tok")
    if top_k > num_experts:
        raise read.error("num_experts_per_tok", f"must be at most the {num_experts} experts, not {top_k}")
    return top_k
