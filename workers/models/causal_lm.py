"""One decoder for Llama, Mistral, Qwen2 and Qwen3, which differ by the fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, KVScales
from attention.forward_context import ForwardContext, forward_context
from attention.kv_cache import KVCacheSpec, layer_places
from attention.layers.attention import Attention
from attention.metadata import CommonAttentionMetadata
from attention.spec import FP8, AttentionSpec
from workers.layers.linear import Linear, RMSNorm, empty_parameter
from workers.models.config.model_config import ModelConfig
from workers.models.llama import DecoderLayer
from workers.models.lm_head import LMHead
from workers.models.rotary import make_rotation
from workers.ops.cache_write import CacheWrite
from workers.parallel.group import SINGLE, TensorParallelGroup


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


class Decoder(nn.Module):
    """The model, or one rank's shard of it.

    Its parameters are uninitialised until a loader fills them and calls `pack`. Ranks run the same batches in the same
    order; what `forward`, `project` and `compute_logits` return is the same bit for bit on all of them.

    Attributes:
        config: the architecture of the whole model.
        shard: what this rank computes of every layer.

    Args:
        config: the architecture of the whole model.
        backend: how its layers attend.
        block_size: tokens in a KV block.
        dtype: of weights and activations.
        device: where it runs.
        kv_cache_dtype: what keys and values are stored as; None: `dtype`. The scales of an FP8 cache are 1 until
            `set_kv_scales`: never found by looking, because two workers that share a cache must use the same.
        group: the ranks that share the model.

    Raises:
        ConfigError: the group's size does not divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: type[AttentionBackend],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: torch.dtype | None = None,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        super().__init__()
        self.config = config
        self.shard = shard = config.sharded(group.size)
        self.group = group
        self.backend = backend
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.kv_cache_dtype = kv_cache_dtype
        self._rotation = make_rotation(shard, dtype, device)
        num_rows = config.vocab_share(group.size) * group.size
        self.embed_tokens = empty_parameter(num_rows, config.hidden_size, dtype=dtype, device=device)
        self._attention = {
            f"layers.{i}": Attention(
                attention_spec(shard, window, kv_cache_dtype), backend, f"layers.{i}", kv_scales=KVScales()
            )
            for i, window in enumerate(config.sliding_windows)
        }
        self._builders = [
            (
                backend.builder_class(spec, dtype, block_size, device),
                [name for name, attention in self._attention.items() if attention.spec == spec],
            )
            for spec in attention_specs(shard, kv_cache_dtype)
        ]
        self._layer_index = {name: i for i, name in enumerate(self._attention)}
        self._places = layer_places(self.kv_cache_groups)
        self._in_order = [
            DecoderLayer(shard, attention, self._rotation, dtype, device, group)
            for attention in self._attention.values()
        ]
        self.layers = nn.ModuleList(self._in_order)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self._norms_behind = [*(layer.input_norm for layer in self._in_order[1:]), self.norm]
        self.lm_head = LMHead(config, self.embed_tokens, dtype, device, group)

    @property
    def kv_cache_groups(self) -> tuple[KVCacheSpec, ...]:
        """The KV cache that `forward` expects, of this rank's heads: a group for each kind of layer, lowest first."""
        shard, dtype = self.shard, self.kv_cache_dtype or self.dtype
        return tuple(
            KVCacheSpec(
                tuple(i for i, other in enumerate(shard.sliding_windows) if other == window),
                shard.num_kv_heads,
                shard.head_size,
                self.block_size,
                dtype,
                kind="full" if window is None else "sliding",
                window=window,
            )
            for window in dict.fromkeys(shard.sliding_windows)
        )

    def set_kv_scales(self, layer: int, scales: KVScales) -> None:
        """Use these scales for a layer's FP8 cache, as its checkpoint says; before anything is in the cache."""
        self._in_order[layer].attention.impl.kv_scales = scales

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

    def pack(self) -> None:
        """Bring the weights into the order that the device's kernels read fastest; after this none can be loaded."""
        for module in self.modules():
            if isinstance(module, Linear | LMHead):
                module.pack()

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
            kv_caches: for each cache group (layers, num_blocks, 2, block_size, Hkv, D), of this rank's heads; this
                batch's keys and values are written to it.
            metadata: the batch, for each cache group.
            on_layer: called with a layer's index as soon as the layer's keys and values are in the cache (on a GPU:
                as soon as the kernels that put them there are queued), before the rest of the layer runs.

        Returns:
            (T, hidden_size), normalised, for `compute_logits`.
        """
        prepared = self._rotation.prepare(positions)
        hidden = F.embedding(input_ids, self.embed_tokens)
        normed: torch.Tensor = self._in_order[0].input_norm(hidden)
        layer_caches = [kv_caches[group][index] for group, index in self._places]
        caches = self._cache_writes(layer_caches, metadata)
        with forward_context(self._context(layer_caches, metadata, on_layer)):
            for layer, cache, next_norm in zip(self._in_order, caches, self._norms_behind, strict=True):
                hidden, normed = layer(hidden, normed, prepared, cache, next_norm)
        return normed

    def _cache_writes(
        self, caches: Sequence[torch.Tensor], common: Sequence[CommonAttentionMetadata]
    ) -> Sequence[CacheWrite | None]:
        """For each layer, where its rotation stores keys and values; None where attention does.

        In decode nobody needs them but the cache. Prefill attends to its own, too, and not by way of the cache.
        """
        if not (self._rotation.can_store and common[0].decode_only):
            return (None,) * len(self._in_order)
        return [
            CacheWrite(cache, common[group].slot_mapping, layer.attention.impl.kv_scales)
            for cache, layer, (group, _) in zip(caches, self._in_order, self._places, strict=True)
        ]

    def _context(
        self,
        caches: Sequence[torch.Tensor],
        common: Sequence[CommonAttentionMetadata],
        on_layer: Callable[[int], None] | None,
    ) -> ForwardContext:
        metadata: dict[str, AttentionMetadata] = {}
        for builder, names in self._builders:
            group, _ = self._places[self._layer_index[names[0]]]
            metadata.update(dict.fromkeys(names, builder.build(common[group])))
        return ForwardContext(
            layers=self._attention,
            metadata=metadata,
            kv_caches=dict(zip(self._attention, caches, strict=True)),
            save_layer=None if on_layer is None else lambda name: on_layer(self._layer_index[name]),
        )

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
        return logits
