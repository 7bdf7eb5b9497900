"""Llama 2 and 3 (arXiv:2302.13971, arXiv:2407.21783), and what families like it share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.gated_mlp import GatedMLP
from workers.layers.norm import HeadNorm, RMSNorm, WideNorm
from workers.layers.residual import ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch, SelfAttention
from workers.layers.temperature import AttentionTemperature
from workers.loading.config_reader import ConfigReader
from workers.models.causal_lm import CausalLM
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.heads import FULL, read_attention, refuse_other_layer_types
from workers.models.config.model_config import ModelConfig
from workers.models.weight_map import WeightMap


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A model of Llama's layers.

    Attributes:
        qkv_bias: whether the query, key and value projections have a bias.
        o_bias: whether the attention's output projection has one.
        mlp_bias: whether the MLP's projections have one.
        qk_norm: whether each head of queries and keys is normalised before it is rotated.
        residual_scale: multiplies what attention and MLP add to the residual stream.
        fused_qkv: whether checkpoints hold queries', keys' and values' projections as one tensor.
        fused_gate_up: whether they hold the MLP's gate and up as one.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    residual_scale: float = 1.0
    fused_qkv: bool = False
    fused_gate_up: bool = False

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        refuse_other_layer_types(read, FULL)
        biased = read.flag("attention_bias", False)
        return cls(
            **cls.read_common(read, generation_config),
            attention=read_attention(read, num_kv_heads=read.positive_int("num_attention_heads")),
            qkv_bias=biased,
            o_bias=biased,
            mlp_bias=read.flag("mlp_bias", False),
        )


def make_head_norm(
    config: LlamaConfig, attention: Attention, context: LayerContext, *, plus_one: bool = False, weighted: bool = True
) -> HeadNorm:
    """Of the queries and keys of a layer; see `HeadNorm`."""
    spec = attention.spec
    num_heads = spec.num_heads + spec.num_kv_heads
    return HeadNorm(num_heads, spec.head_size, config.norm_eps, context, plus_one=plus_one, weighted=weighted)


def make_self_attention(
    config: LlamaConfig,
    attention: Attention,
    rotation: Rotation,
    context: LayerContext,
    *,
    head_norm: HeadNorm | None = None,
    wide_norm: WideNorm | None = None,
    temperature: AttentionTemperature | None = None,
) -> SelfAttention:
    """The attention of a layer, with its projections; without a `head_norm` it has the one that `qk_norm` asks for."""
    if head_norm is None and config.qk_norm:
        head_norm = make_head_norm(config, attention, context)
    return SelfAttention(
        config.hidden_size,
        attention,
        rotation,
        context,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        qk_norm=head_norm,
        wide_norm=wide_norm,
        temperature=temperature,
    )


def make_mlp(config: LlamaConfig, context: LayerContext) -> GatedMLP:
    """The MLP of a layer, or one rank's share of it."""
    return GatedMLP(
        config.hidden_size,
        config.intermediate_size // context.group.size,
        context,
        bias=config.mlp_bias,
        activation=config.activation,
    )


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, attention: Attention, rotation: Rotation, context: LayerContext) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, context)
        self.self_attention = make_self_attention(config, attention, rotation, context)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_eps, context)
        self.mlp = make_mlp(config, context)
        self._residual_scale = config.residual_scale

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        attended = self.self_attention(stream.normalized(self.input_norm), batch)
        stream.add_product(self.self_attention.o_proj, attended, self._residual_scale)
        inner = self.mlp.inner(stream.normalized(self.post_attention_norm))
        stream.add_product(self.mlp.down_proj, inner, self._residual_scale)


class LlamaForCausalLM(CausalLM):
    """Llama, and what differs from it by the fields of `LlamaConfig`."""

    config_class: ClassVar[type[ModelConfig]] = LlamaConfig
    config: LlamaConfig
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "post_attention_norm",
    }
    """Of a layer: their names in checkpoints, and those of the modules."""

    def make_layer(self, index: int, attention: Attention, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        return LlamaLayer(self.config, attention, rotation, self.context)

    @classmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """See `CausalLM.map_weights`."""
        assert isinstance(config, LlamaConfig)
        hidden = config.hidden_size
        weights.outside_layers(config)
        for i, attention in enumerate(config.attention):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            for name, norm in cls.norms.items():
                weights.vector(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight", hidden)
            cls.map_attention(config, weights, attention, f"{theirs}.self_attn", f"{ours}.self_attention")
            cls.map_mlp(config, weights, i, theirs, ours)

    @classmethod
    def map_attention(
        cls, config: ModelConfig, weights: WeightMap, attention: AttentionConfig, theirs: str, ours: str
    ) -> None:
        """Enter the tensors of a layer's attention.

        Args:
            config: of the whole model.
            weights: where they are entered.
            attention: of the layer, of the whole model.
            theirs: what the attention is called in a checkpoint.
            ours: what it is called in the model.
        """
        assert isinstance(config, LlamaConfig)
        weights.attention(
            theirs,
            ours,
            attention,
            config.hidden_size,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            fused=config.fused_qkv,
        )
        if config.qk_norm:
            weights.head_norms(theirs, ours, attention)

    @classmethod
    def map_mlp(cls, config: ModelConfig, weights: WeightMap, index: int, theirs: str, ours: str) -> None:
        """Enter the tensors of a layer's MLP.

        Args:
            config: of the whole model.
            weights: where they are entered.
            index: of the layer.
            theirs: what the layer is called in a checkpoint.
            ours: what it is called in the model.
        """
        assert isinstance(config, LlamaConfig)
        hidden, inner = config.hidden_size, config.intermediate_size
        weights.gated_mlp(
            f"{theirs}.mlp", f"{ours}.mlp", hidden, inner, bias=config.mlp_bias, fused=config.fused_gate_up
        )
