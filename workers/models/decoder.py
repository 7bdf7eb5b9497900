"""One decoder for Llama, Mistral, Qwen2 and Qwen3, which differ by the fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, KVScales
from attention.forward_context import ForwardContext, forward_context
from attention.kv_cache import KVCacheSpec
from attention.layer import Attention
from attention.metadata import CommonAttentionMetadata
from attention.spec import AttentionSpec
from workers.fused_ops.rope import CacheWrite
from workers.models.config import ModelConfig
from workers.models.layers import GatedMLP, Linear, RMSNorm, empty_parameter, pack_weight, packed_linear
from workers.models.rotation import Rotation, make_rotation


def attention_spec(
    config: ModelConfig, sliding_window: int | None, kv_cache_dtype: torch.dtype | None = None
) -> AttentionSpec:
    """What the layers of `config` with that window ask of an attention backend."""
    return AttentionSpec(
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        config.head_size**-0.5,
        sliding_window,
        kv_cache_dtype=kv_cache_dtype,
    )


def attention_specs(config: ModelConfig, kv_cache_dtype: torch.dtype | None = None) -> Sequence[AttentionSpec]:
    """Every kind of attention layer in `config`, once."""
    return [attention_spec(config, window, kv_cache_dtype) for window in dict.fromkeys(config.sliding_windows)]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        attention: Attention,
        rotation: Rotation,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.attention = attention
        self._rotation = rotation
        self._head_size = config.head_size
        rotated = config.num_heads + config.num_kv_heads
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype, device=device)
        qkv_size = (rotated + config.num_kv_heads) * config.head_size
        self.qkv_proj = Linear(config.hidden_size, qkv_size, config.qkv_bias, dtype, device)
        self.qk_norm = (
            RMSNorm(rotated, config.head_size, eps=eps, dtype=dtype, device=device) if config.qk_norm else None
        )
        self.o_proj = Linear(config.num_heads * config.head_size, config.hidden_size, config.o_bias, dtype, device)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, device)

    def forward(self, hidden: torch.Tensor, prepared: Any, cache: CacheWrite | None) -> torch.Tensor:
        """(T, hidden_size) to the same, the residual stream, which may be overwritten; inside a `forward_context`.

        `prepared` is what the rotation made of the batch's positions; `cache` is where it stores keys and values, None
        where attention does.
        """
        hidden = self.o_proj.add_to(hidden, self._attend(hidden, prepared, cache))
        return self.mlp.add_to(hidden, self.post_attention_norm(hidden))

    def _attend(self, hidden: torch.Tensor, prepared: Any, cache: CacheWrite | None) -> torch.Tensor:
        qkv = self.qkv_proj(self.input_norm(hidden)).view(hidden.shape[0], -1, self._head_size)
        attended: torch.Tensor = self.attention(*self._rotation.apply(qkv, prepared, self.qk_norm, cache))
        return attended.flatten(1)


class Decoder(nn.Module):
    """The model. Its parameters are uninitialised until a loader fills them and calls `pack`.

    Args:
        config: the architecture.
        backend: how its layers attend.
        block_size: tokens in a KV block.
        dtype: of weights and activations.
        device: where it runs.
        kv_cache_dtype: what keys and values are stored as; None: `dtype`. The scales of an FP8 cache are 1 until
            `set_kv_scales`: never found by looking, because two workers that share a cache must use the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: type[AttentionBackend],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.kv_cache_dtype = kv_cache_dtype
        self._rotation = make_rotation(config, dtype, device)
        self.embed_tokens = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self._attention = {
            f"layers.{i}": Attention(
                attention_spec(config, window, kv_cache_dtype), backend, f"layers.{i}", kv_scales=KVScales()
            )
            for i, window in enumerate(config.sliding_windows)
        }
        self._builders = [
            (
                backend.builder_class(spec, dtype, block_size, device),
                [name for name, attention in self._attention.items() if attention.spec == spec],
            )
            for spec in attention_specs(config, kv_cache_dtype)
        ]
        self._layer_index = {name: i for i, name in enumerate(self._attention)}
        self._in_order = [
            DecoderLayer(config, attention, self._rotation, dtype, device) for attention in self._attention.values()
        ]
        self.layers = nn.ModuleList(self._in_order)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device)
        )
        self._packed_embeddings: torch.Tensor | None = None

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        """The KV cache that `forward` expects."""
        config, dtype = self.config, self.kv_cache_dtype or self.dtype
        return KVCacheSpec(config.num_layers, config.num_kv_heads, config.head_size, self.block_size, dtype)

    def set_kv_scales(self, layer: int, scales: KVScales) -> None:
        """Use these scales for a layer's FP8 cache, as its checkpoint says; before anything is in the cache."""
        self._in_order[layer].attention.impl.kv_scales = scales

    @property
    def decodes_in_graphs(self) -> bool:
        """Whether `forward` can be captured in a CUDA graph for batches of one token each."""
        return all(builder.graph_safe_decode for builder, _ in self._builders)

    def pack(self) -> None:
        """Bring the weights into the order that the device's kernels read fastest; after this none can be loaded.

        Tied embeddings are then kept twice: as rows to look up, and packed to multiply with.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.lm_head is None:
            self._packed_embeddings = pack_weight(self.embed_tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CommonAttentionMetadata,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Run one batch through the model.

        Args:
            input_ids: (T,) int64.
            positions: (T,) int64, of each token in its sequence.
            kv_cache: (L, num_blocks, 2, block_size, Hkv, D); this batch's keys and values are written to it.
            metadata: the batch.
            on_layer: called with a layer's index as soon as the layer's keys and values are in the cache (on a GPU:
                as soon as the kernels that put them there are queued), before the rest of the layer runs.

        Returns:
            (T, hidden_size), normalised, for `compute_logits`.
        """
        prepared = self._rotation.prepare(positions)
        hidden = F.embedding(input_ids, self.embed_tokens)
        with forward_context(self._context(kv_cache, metadata, on_layer)):
            for layer, cache in zip(self._in_order, self._cache_writes(kv_cache, metadata), strict=True):
                hidden = layer(hidden, prepared, cache)
        normalized: torch.Tensor = self.norm(hidden)
        return normalized

    def _cache_writes(self, kv_cache: torch.Tensor, common: CommonAttentionMetadata) -> Sequence[CacheWrite | None]:
        """For each layer, where its rotation stores keys and values; None where attention does.

        In decode nobody needs them but the cache. Prefill attends to its own, too, and not by way of the cache.
        """
        if not (self._rotation.can_store and common.decode_only):
            return (None,) * len(self._in_order)
        return [
            CacheWrite(cache, common.slot_mapping, layer.attention.impl.kv_scales)
            for cache, layer in zip(kv_cache.unbind(0), self._in_order, strict=True)
        ]

    def _context(
        self, kv_cache: torch.Tensor, common: CommonAttentionMetadata, on_layer: Callable[[int], None] | None
    ) -> ForwardContext:
        metadata: dict[str, AttentionMetadata] = {}
        for builder, names in self._builders:
            metadata.update(dict.fromkeys(names, builder.build(common)))
        return ForwardContext(
            layers=self._attention,
            metadata=metadata,
            kv_caches=dict(zip(self._attention, kv_cache.unbind(0), strict=True)),
            save_layer=None if on_layer is None else lambda name: on_layer(self._layer_index[name]),
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, hidden_size) from `forward` to (N, vocab_size) float32."""
        return self.project(hidden).float()

    def project(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(N, hidden_size) from `forward` to (N, vocab_size) logits in the model's dtype.

        Args:
            hidden: what `forward` returned, or some of its rows.
            out: where to write, of the result's shape and dtype. None: a new tensor.
        """
        weight = self.embed_tokens if self.lm_head is None else self.lm_head.weight
        if out is not None and weight is not None and self._packed_embeddings is None:
            return torch.mm(hidden, weight.t(), out=out)
        if self.lm_head is not None:
            logits: torch.Tensor = self.lm_head(hidden)
        elif self._packed_embeddings is not None:
            logits = packed_linear(hidden, self._packed_embeddings, None)
        else:
            logits = F.linear(hidden, self.embed_tokens)
        return logits if out is None else out.copy_(logits)
