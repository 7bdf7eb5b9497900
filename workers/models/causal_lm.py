"""What all families of decoder-only models have in common: embedding, layers, norm, output matrix, a paged cache."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, KVScales
from attention.forward_context import ForwardContext, forward_context
from attention.kv_cache import layer_places
from attention.layers.attention import Attention
from attention.layers.chunked_local_attention import ChunkedLocalAttention
from attention.layers.mla_attention import MLAAttention
from attention.metadata import CommonAttentionMetadata
from attention.spec import FP8, AttentionSpec
from kv_transfer.identity import UNKNOWN, KVIdentity
from workers.errors import ConfigError
from workers.layers.context import LayerContext
from workers.layers.linear import Linear
from workers.layers.linear_methods.base import empty_parameter
from workers.layers.linear_methods.choice import linear_method_for
from workers.layers.lm_head import LMHead, vocab_share
from workers.layers.moe.experts import GroupedLinear
from workers.layers.norm import HeadNorm, RMSNorm
from workers.layers.residual import Norm, ResidualStream
from workers.layers.rotation import HeadShape, Rotation, make_rotations
from workers.layers.self_attention import LayerBatch
from workers.loading.mxfp4_numbers import Mxfp4Numbers
from workers.models.cache_groups import cache_groups
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.model_config import ModelConfig
from workers.models.weight_map import WeightMap
from workers.ops.cache_write import CacheWrite
from workers.parallel.group import SINGLE, TensorParallelGroup


def attention_specs(
    config: ModelConfig, kv_cache_dtype: torch.dtype | None = None, num_ranks: int = 1
) -> list[AttentionSpec]:
    """Every kind of attention layer that each of `num_ranks` ranks has, once."""
    return list(dict.fromkeys(layer.sharded(num_ranks).spec(kv_cache_dtype) for layer in config.attention))


class CausalLM(nn.Module, ABC):
    """A model, or one rank's shard of it; a family says how its layers are made and where its weights are.

    Its parameters are uninitialised until a loader fills them and calls `process_weights`. Ranks run the same batches
    in the same order; what `forward`, `project` and `compute_logits` return is the same bit for bit on all of them.

    Attributes:
        config: the architecture of the whole model.
        context: what its modules have in common.
        max_model_len: context window, tokens.
        kv_cache_groups: the caches that `forward` expects, of this rank's heads.

    Args:
        config: the architecture of the whole model.
        backends: how each kind of its layers attends.
        block_size: tokens in a KV block.
        dtype: of weights and activations.
        device: where it runs.
        kv_cache_dtype: what keys and values are stored as; None: `dtype`. The scales of an FP8 cache are 1 until
            `set_kv_scales`: never found by looking, because two workers that share a cache must use the same.
        group: the ranks that share the model.
        max_model_len: tokens of the longest sequence that is served; None: what the model was made for.
        experts_in_mxfp4: whether its experts are kept so.

    Raises:
        ConfigError: the group's size does not divide the model, or the block size not the chunks that its layers
            attend within.
        AttentionBackendError: a backend whose KV cache does not lie in blocks.
    """

    config_class: ClassVar[type[ModelConfig]]
    """What the family reads of a config.json."""

    def __init__(
        self,
        config: ModelConfig,
        backends: Mapping[AttentionSpec, type[AttentionBackend]],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: torch.dtype | None = None,
        group: TensorParallelGroup = SINGLE,
        max_model_len: int | None = None,
        experts_in_mxfp4: bool = False,
    ) -> None:
        super().__init__()
        config.check_divisible(group.size)
        self.config = config
        self.context = LayerContext(dtype, device, group, linear_method_for(device), experts_in_mxfp4)
        self.block_size = block_size
        self.kv_cache_dtype = kv_cache_dtype
        self.max_model_len = config.context_length(max_model_len)
        num_rows = vocab_share(config.vocab_size, group.size) * group.size
        self.embed_tokens = empty_parameter(num_rows, config.hidden_size, dtype=dtype, device=device)
        own = [layer.sharded(group.size) for layer in config.attention]
        self._attention = [self._make_attention(layer, backends, f"layers.{i}") for i, layer in enumerate(own)]
        self._builders = _builders(self._attention, dtype, block_size, device)
        self._layer_index = {attention.name: i for i, attention in enumerate(self._attention)}
        kinds = [(attention.spec, attention.backend) for attention in self._attention]
        self.kv_cache_groups = cache_groups(kinds, block_size, kv_cache_dtype or dtype)
        self._places = dict(zip(self._layer_index, layer_places(self.kv_cache_groups), strict=True))
        turns = [(layer.rope, _rotated_heads(layer)) for layer in own]
        self.rotated_kinds = [(rope, heads.head_size) for rope, heads in dict.fromkeys(turns) if rope is not None]
        """What its layers rotate, and the size of the heads: each kind once."""
        self.identity: KVIdentity = UNKNOWN
        """Whose keys and values it writes; known once its weights are loaded."""
        self.weights_bytes = 0
        """That its weights take; known once they are loaded."""
        self._rotations = make_rotations(turns, self.max_model_len, dtype, device)
        self._in_order = [
            self.make_layer(i, attention, self._rotations[turn])
            for i, (attention, turn) in enumerate(zip(self._attention, turns, strict=True))
        ]
        self.layers = nn.ModuleList(self._in_order)
        self.norm = self.make_norm()
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, tied, self.context)

    @abstractmethod
    def make_layer(self, index: int, attention: Any, rotation: Rotation) -> nn.Module:
        """Layer `index`: called with a `ResidualStream` and a `LayerBatch`, it changes the stream.

        Args:
            index: from 0.
            attention: of this rank's heads; the layer calls it. An `Attention`, or an `MLAAttention` where the layer's
                config has `mla`.
            rotation: of the same heads, or of the parts of theirs that latent attention rotates.
        """

    @classmethod
    @abstractmethod
    def map_weights(cls, config: ModelConfig, weights: WeightMap) -> None:
        """Enter every tensor that a checkpoint of this model must hold."""

    def make_norm(self) -> Norm:
        """What is behind the last layer."""
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.context)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.context.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.context.device

    @property
    def group(self) -> TensorParallelGroup:
        """The ranks that share the model."""
        return self.context.group

    @property
    def backend_names(self) -> str:
        """The attention backends of its layers, each once."""
        return "; ".join(dict.fromkeys(attention.backend.name for attention in self._attention))

    def set_kv_scales(self, layer: int, scales: KVScales) -> None:
        """Use these scales for a layer's FP8 cache, as its checkpoint says; before anything is in the cache."""
        self._attention[layer].impl.kv_scales = scales

    @property
    def kv_scales(self) -> list[KVScales]:
        """Those of each layer's cache."""
        return [attention.impl.kv_scales for attention in self._attention]

    @property
    def has_experts(self) -> bool:
        """Whether some layer's MLP is a mixture of experts."""
        return any(isinstance(module, GroupedLinear) for module in self.modules())

    @property
    def decodes_in_graphs(self) -> bool:
        """Whether `forward` can be captured in a CUDA graph for batches of one token each."""
        return all(builder.graph_safe_decode for builder, _ in self._builders)

    @property
    def prefills_in_graphs(self) -> bool:
        """Whether `forward` can be captured in CUDA graphs for a `lasting` batch of whole prompts.

        With an FP8 cache it cannot: then a prompt attends to what the cache keeps of it, by way of its block table, and
        not to the keys and values that it brings.
        """
        return self.kv_cache_dtype != FP8 and all(builder.graph_safe_prefill for builder, _ in self._builders)

    def named_numbers(self) -> dict[str, torch.Tensor | Mxfp4Numbers]:
        """Parameters by name, before they are processed; what is kept quantised as the plain one that it means."""
        found: dict[str, torch.Tensor | Mxfp4Numbers] = dict(self.named_parameters())
        for name, module in self.named_modules():
            if isinstance(module, GroupedLinear):
                for own, _ in module.named_parameters():
                    del found[f"{name}.{own}"]
                found.update({f"{name}.{own}": numbers for own, numbers in module.named_numbers().items()})
        return found

    def process_weights(self) -> None:
        """Bring the weights into the form that the device's kernels read; once, after this none can be loaded."""
        for module in self.modules():
            if isinstance(module, Linear | LMHead | RMSNorm | HeadNorm | GroupedLinear):
                module.process_weights()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        metadata: Sequence[CommonAttentionMetadata],
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Run one batch through the model.

        Args:
            input_ids: (T,) int64.
            positions: (T,) int64, of each token in its sequence.
            kv_caches: one for each of `kv_cache_groups`; this batch's keys and values are written to it.
            metadata: the batch, for each cache group.
            on_layer: called with a layer's index as soon as the layer's keys and values are in the cache (on a GPU:
                as soon as the kernels that put them there are queued), before the rest of the layer runs.

        Returns:
            (T, hidden_size), normalised, for `compute_logits`.
        """
        of_layers = [kv_cache.unbind(0) for kv_cache in kv_caches]
        caches = {name: of_layers[group][index] for name, (group, index) in self._places.items()}
        batch = LayerBatch(
            positions,
            {rotation: rotation.prepare(positions) for rotation in self._rotations.values()},
            self._cache_writes(caches, metadata),
        )
        stream = ResidualStream(self.embed(input_ids))
        with forward_context(self._forward_context(caches, metadata, on_layer)):
            for layer in self._in_order:
                layer(stream, batch)
        return stream.normalized(self.norm)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, hidden_size) from `forward` to (N, vocab_size) float32."""
        return self.project(hidden).float()

    def project(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, hidden_size) from `forward` to (N, vocab_size) logits in the model's dtype.

        Args:
            hidden: what `forward` returned, or some of its rows.
            out: where to write, of the result's shape and dtype, contiguous. None: a new tensor.
        """
        logits: torch.Tensor = self.lm_head(hidden, out)
        scale, cap = self.config.logits_scale, self.config.logits_soft_cap
        if scale != 1.0:
            logits.mul_(scale)
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) int64 token ids → (T, hidden size), what the first layer is given."""
        hidden = F.embedding(input_ids, self.embed_tokens)
        scale = self.config.embedding_scale
        if scale == 1.0:
            return hidden
        return hidden.mul_(_rounded(scale, self.dtype) if self.config.rounds_embedding_scale else scale)

    def _make_attention(
        self, config: AttentionConfig, backends: Mapping[AttentionSpec, type[AttentionBackend]], name: str
    ) -> Attention | MLAAttention:
        spec, mla = config.spec(self.kv_cache_dtype), config.mla
        if mla is not None:
            num_features = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            kv_b_proj = torch.empty(num_features, mla.kv_lora_rank, dtype=self.dtype, device=self.device)
            return MLAAttention(spec, backends[spec], name, kv_b_proj, kv_scales=KVScales())
        sinks = torch.empty(config.num_heads, device=self.device) if config.has_sinks else None
        if config.chunk_size is None:
            return Attention(spec, backends[spec], name, sinks, kv_scales=KVScales())
        if config.chunk_size % self.block_size:
            raise ConfigError(
                f"block_size is {self.block_size}, and does not divide the model's attention chunks of "
                f"{config.chunk_size} tokens"
            )
        return ChunkedLocalAttention(spec, backends[spec], name, config.chunk_size, sinks, KVScales())

    def _cache_writes(
        self, caches: Mapping[str, torch.Tensor], common: Sequence[CommonAttentionMetadata]
    ) -> Mapping[str, CacheWrite]:
        """Where rotations store keys and values, by layer; none where attention does.

        In decode nobody needs them but the cache. Prefill attends to its own, too, and not by way of the cache. A
        backend whose cache is another than the kernel writes stores them itself.
        """
        if not (common[0].decode_only and all(rotation.can_store for rotation in self._rotations.values())):
            return {}
        return {
            attention.name: CacheWrite(
                caches[attention.name], common[self._places[attention.name][0]].slot_mapping, attention.impl.kv_scales
            )
            for attention in self._attention
            if attention.backend.accepts_stored_keys()
        }

    def _forward_context(
        self,
        caches: Mapping[str, torch.Tensor],
        common: Sequence[CommonAttentionMetadata],
        on_layer: Callable[[int], None] | None,
    ) -> ForwardContext:
        metadata: dict[str, AttentionMetadata] = {}
        for builder, names in self._builders:
            group, _ = self._places[names[0]]
            metadata.update(dict.fromkeys(names, builder.build(common[group])))
        return ForwardContext(
            layers={attention.name: attention for attention in self._attention},
            metadata=metadata,
            kv_caches=caches,
            save_layer=None if on_layer is None else lambda name: on_layer(self._layer_index[name]),
        )


def _rotated_heads(config: AttentionConfig) -> HeadShape:
    """Of a layer, or the parts of its heads that latent attention rotates."""
    size = config.head_size if config.mla is None else config.mla.qk_rope_head_dim
    return HeadShape(config.num_heads, config.num_kv_heads, size)


def _builders(
    layers: Sequence[Attention | MLAAttention], dtype: torch.dtype, block_size: int, device: torch.device
) -> list[Any]:
    """A builder for each kind of layer, and the names of its layers."""
    kinds: dict[tuple[AttentionSpec, type[AttentionBackend]], list[str]] = {}
    for layer in layers:
        kinds.setdefault((layer.spec, layer.backend), []).append(layer.name)
    return [(backend.builder_class(spec, dtype, block_size, device), names) for (spec, backend), names in kinds.items()]


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()
