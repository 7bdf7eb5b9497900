"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, and experts in all but some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from attention.layers.mla_attention import MLAAttention
from workers.errors import ConfigError
from workers.layers.latent_attention import LatentAttention
from workers.layers.moe.mlp import MoEConfig
from workers.layers.rotation import Rotation
from workers.loading.config_reader import ConfigReader
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.latent_heads import read_latent_attention, read_q_lora_rank
from workers.models.config.model_config import ModelConfig
from workers.models.config.rope import RopeFamily
from workers.models.families.llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    map_expert_matrices,
    map_router,
    map_shared_experts,
)
from workers.models.latent_weights import map_latent_attention
from workers.models.weight_map import WeightMap
from workers.ops.router_config import RouterConfig

_LATENT_NORM_EPS = 1e-6
"""Of the norms of latents and compressed queries, whatever `rms_norm_eps` is, as in the published code."""


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(LlamaMoEConfig):
    """DeepSeek-V2, and what differs from it by these fields.

    Attributes:
        q_lora_rank: size that queries are compressed to; None: they are not.
        attention_bias: whether the attention's projections have a bias, but for those that expand to heads.
        num_mtp_layers: layers behind the last that a checkpoint may hold; they predict tokens further on.
    """

    q_lora_rank: int | None
    attention_bias: bool
    num_mtp_layers: int = 0

    def shared_out(self) -> Mapping[str, int]:
        """See `ModelConfig.shared_out`."""
        sizes = {
            "intermediate_size": self.dense_intermediate_size if not all(self.is_sparse) else 0,
            "moe_intermediate_size": self.moe.intermediate_size,
            "shared experts' intermediate size": self.moe.shared_intermediate_size,
        }
        return sizes if any(self.is_sparse) else {"intermediate_size": self.dense_intermediate_size}

    @classmethod
    def read_deepseek(
        cls, read: ConfigReader, generation_config: Mapping[str, Any] | None, moe: MoEConfig, interleaved: bool = True
    ) -> dict[str, Any]:
        """The fields that all of these models have but for `is_sparse`, as keyword arguments.

        Raises:
            CheckpointError: a value is missing, wrong or not supported; names file and key.
        """
        common = cls.read_common(read, generation_config)
        return {
            **common,
            "dense_intermediate_size": common["intermediate_size"],
            "intermediate_size": moe.features,
            "attention": read_latent_attention(read, RopeFamily(interleaved=interleaved)),
            "q_lora_rank": read_q_lora_rank(read),
            "attention_bias": read.flag("attention_bias", False),
            "moe": moe,
        }

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        read.refuse_others({"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False})
        method = read.get_or_default("topk_method")
        if method not in ("greedy", "group_limited_greedy"):
            raise read.error("topk_method", f"{method!r} is not supported, only greedy and group_limited_greedy")
        moe = read_moe(read, limits_groups=method == "group_limited_greedy")
        return cls(**cls.read_deepseek(read, generation_config, moe), is_sparse=read_sparse_layers(read))


def read_moe(read: ConfigReader, *, limits_groups: bool, sigmoid: bool = False) -> MoEConfig:
    """The mixture of a layer.

    Args:
        read: config.json.
        limits_groups: whether `n_group` and `topk_group` count.
        sigmoid: whether experts are scored so, with a bias for the choice alone, and the weights may be renormalised.

    Raises:
        CheckpointError: a value is missing, or they do not fit each other; names file and key.
    """
    inner, num_experts = read.positive_int("moe_intermediate_size"), read.positive_int("n_routed_experts")
    is_null = "n_shared_experts" in read and read.get("n_shared_experts") is None
    try:
        router = RouterConfig(
            num_experts,
            read.positive_int("num_experts_per_tok"),
            scores="sigmoid" if sigmoid else "softmax",
            renormalize=sigmoid and read.flag("norm_topk_prob"),
            scaling_factor=read.positive_float("routed_scaling_factor"),
            num_groups=read.positive_int("n_group") if limits_groups else 1,
            top_k_groups=read.positive_int("topk_group") if limits_groups else 1,
            group_score="sum_of_two" if sigmoid else "max",
        )
    except ConfigError as error:
        raise read.error("n_routed_experts", str(error)) from error
    return MoEConfig(
        router=router,
        intermediate_size=inner,
        shared_intermediate_size=inner * read.non_negative_int("n_shared_experts", 0 if is_null else None),
        router_corrected=sigmoid,
        router_in_float32=True,
    )


def read_sparse_layers(read: ConfigReader) -> tuple[bool, ...]:
    """Which layers have experts: all `moe_layer_freq`th from `first_k_dense_replace` on.

    Raises:
        CheckpointError: not numbers; names file and key.
    """
    first, every = read.non_negative_int("first_k_dense_replace"), read.positive_int("moe_layer_freq", 1)
    return tuple(i >= first and i % every == 0 for i in range(read.positive_int("num_hidden_layers")))


class DeepseekV2ForCausalLM(LlamaMoEForCausalLM):
    """DeepSeek-V2, and what differs from it by the fields of `DeepseekConfig`."""

    config_class: ClassVar[type[ModelConfig]] = DeepseekConfig
    config: DeepseekConfig

    def make_self_attention(self, index: int, attention: MLAAttention, rotation: Rotation) -> LatentAttention:
        """See `LlamaMoEForCausalLM.make_self_attention`."""
        config = self.config
        return LatentAttention(
            config.hidden_size,
            attention,
            rotation,
            self.context,
            q_lora_rank=config.q_lora_rank,
            norm_eps=_LATENT_NORM_EPS,
            bias=config.attention_bias,
        )

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        assert isinstance(config, DeepseekConfig)
        super().map_weights(config, weights)
        first_mtp = config.num_layers
        weights.ignored |= {f"model.layers.{i}." for i in range(first_mtp, first_mtp + config.num_mtp_layers)}

    @classmethod
    def map_attention(
        cls, config: ModelConfig, weights: WeightMap, attention: AttentionConfig, theirs: str, ours: str
    ) -> None:
        """See `LlamaForCausalLM.map_attention`."""
        assert isinstance(config, DeepseekConfig)
        q_lora_rank, bias = config.q_lora_rank, config.attention_bias
        map_latent_attention(weights, theirs, ours, attention, config.hidden_size, q_lora_rank=q_lora_rank, bias=bias)

    @classmethod
    def map_experts(cls, config: LlamaMoEConfig, weights: WeightMap, theirs: str, ours: str) -> None:
        """See `LlamaMoEForCausalLM.map_experts`."""
        moe, gate = config.moe, f"{theirs}.mlp.gate"
        map_router(config, weights, gate, ours)
        if moe.router_corrected:
            bias = "e_score_correction_bias"
            weights.vector(f"{gate}.{bias}", f"{ours}.mlp.router.{bias}", moe.router.num_experts)
        map_expert_matrices(config, weights, theirs, ours)
        if moe.shared_intermediate_size:
            map_shared_experts(config, weights, theirs, ours, "mlp.shared_experts")
