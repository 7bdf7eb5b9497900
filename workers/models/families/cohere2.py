"""Command R7B and Command A (arXiv:2504.00698): attention beside the MLP; only layers with a window have positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from attention.layers.attention import Attention
from workers.layers.context import LayerContext
from workers.layers.norm import LayerNorm
from workers.layers.residual import Norm, ResidualStream
from workers.layers.rotation import Rotation
from workers.layers.self_attention import LayerBatch
from workers.loading.config_reader import ConfigReader
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.heads import FULL, SLIDING, read_attention, read_layer_types, windows_of
from workers.models.config.rope import RopeFamily
from workers.models.families.llama import LlamaConfig, LlamaForCausalLM, make_mlp, make_self_attention

_ROPE = RopeFamily(interleaved=True)
_SUPPORTED = {
    "use_parallel_block": True,
    "use_gated_activation": True,
    "use_qk_norm": False,
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
}
"""Keys of published configs that `transformers` does not read, and the only values that it is right for."""


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(LlamaConfig):
    """Cohere 2."""

    @classmethod
    def read(cls, read: ConfigReader, generation_config: Mapping[str, Any] | None) -> Self:
        """See `ModelConfig.read`."""
        read.refuse_others(_SUPPORTED)
        biased = read.flag("attention_bias")
        return cls(
            **cls.read_common(read, generation_config, norm_eps_key="layer_norm_eps"),
            attention=_attention(read),
            qkv_bias=biased,
            o_bias=biased,
            logits_scale=read.positive_float("logit_scale"),
        )


def _attention(read: ConfigReader) -> tuple[AttentionConfig, ...]:
    """Every layer's; without `layer_types` every fourth (or `sliding_window_pattern`th) has no window."""
    pattern = read.positive_int("sliding_window_pattern", 4)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(read.positive_int("num_hidden_layers"))]
    types = read_layer_types(read, (FULL, SLIDING), default)
    windows = windows_of(types, read.positive_int("sliding_window"))
    layers = read_attention(read, windows, num_kv_heads=read.positive_int("num_attention_heads"), rope=_ROPE)
    return tuple(layer if layer.sliding_window else replace(layer, rope=None) for layer in layers)


class Cohere2Layer(nn.Module):
    """Attention and MLP behind the same norm, both added to the residual stream."""

    def __init__(self, config: Cohere2Config, attention: Attention, rotation: Rotation, context: LayerContext) -> None:
        super().__init__()
        self.input_norm = LayerNorm(config.hidden_size, config.norm_eps, context)
        self.self_attention = make_self_attention(config, attention, rotation, context)
        self.mlp = make_mlp(config, context)

    def forward(self, stream: ResidualStream, batch: LayerBatch) -> None:
        """See `CausalLM.make_layer`."""
        x = stream.normalized(self.input_norm)
        attended, inner = self.self_attention(x, batch), self.mlp.inner(x)
        stream.add_products((self.self_attention.o_proj, attended), (self.mlp.down_proj, inner))


class Cohere2ForCausalLM(LlamaForCausalLM):
    """Cohere 2."""

    config_class = Cohere2Config
    config: Cohere2Config
    norms: ClassVar[Mapping[str, str]] = {"input_layernorm": "input_norm"}

    def make_layer(self, index: int, attention: Attention, rotation: Rotation) -> nn.Module:
        """See `CausalLM.make_layer`."""
        return Cohere2Layer(self.config, attention, rotation, self.context)

    def make_norm(self) -> Norm:
        """See `CausalLM.make_norm`."""
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.context)
