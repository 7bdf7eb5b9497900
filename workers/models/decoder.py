"""One decoder for Llama, Mistral, Qwen2 and Qwen3, which differ by the fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from attention.kv_cache import KVCacheSpec
from workers.models.config import ModelConfig
from workers.models.layers import GatedMLP, Linear, RMSNorm, empty_parameter, pack_weight, packed_linear
from workers.models.rope import Rotary


def attention_spec(config: ModelConfig, sliding_window: int | None) -> AttentionSpec:
    """What the layers of `config` with that window ask of an attention backend."""
    return AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_size, config.head_size**-0.5, sliding_window
    )


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    The two steps are separate methods so that the caller can act in between, when the layer's keys and values are
    complete.
    """

    def __init__(
        self,
        config: ModelConfig,
        sliding_window: int | None,
        backend: type[AttentionBackend],
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self._rotary = rotary
        self._attention = backend.impl_class(attention_spec(config, sliding_window))
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
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

    def attend(
        self,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        plan: object,
    ) -> torch.Tensor:
        """Put this batch's keys and values in the layer's cache and attend: (T, hidden_size) to (T, Hq * D)."""
        qkv = self.qkv_proj(self.input_norm(hidden)).view(hidden.shape[0], -1, self._head_size)
        rotated = self._num_heads + self._num_kv_heads
        query_key = qkv[:, :rotated]
        if self.qk_norm is not None:
            query_key = self.qk_norm(query_key)
        query_key = self._rotary.rotate(query_key, angles)
        query, key = query_key[:, : self._num_heads], query_key[:, self._num_heads :]
        return self._attention.forward(query, key, qkv[:, rotated:], kv_cache, metadata, plan).flatten(1)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Add what was attended, then the MLP, to the residual stream `hidden` (T, hidden_size)."""
        hidden = self.o_proj.add_to(hidden, attended)
        return self.mlp.add_to(hidden, self.post_attention_norm(hidden))


class Decoder(nn.Module):
    """The model. Its parameters are uninitialised until a loader fills them and calls `pack`.

    Args:
        config: the architecture.
        backend: how its layers attend.
        block_size: tokens in a KV block.
        dtype: of weights, activations and the KV cache.
        device: where it runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: type[AttentionBackend],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._windows = tuple(dict.fromkeys(config.sliding_windows))
        self._rotary = Rotary(config.rope, config.head_size, dtype, device)
        self.embed_tokens = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self._in_order = [
            DecoderLayer(config, window, backend, self._rotary, dtype, device) for window in config.sliding_windows
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
        config = self.config
        return KVCacheSpec(config.num_layers, config.num_kv_heads, config.head_size, self.block_size, self.dtype)

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
        metadata: AttentionMetadata,
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
        plans = {
            window: self.backend.plan(attention_spec(self.config, window), metadata, self.block_size)
            for window in self._windows
        }
        angles = self._rotary.angles(positions)
        hidden = F.embedding(input_ids, self.embed_tokens)
        for i, (layer, layer_cache) in enumerate(zip(self._in_order, kv_cache.unbind(0), strict=True)):
            attended = layer.attend(hidden, angles, layer_cache, metadata, plans[layer.sliding_window])
            if on_layer is not None:
                on_layer(i)
            hidden = layer.finish(hidden, attended)
        normalized: torch.Tensor = self.norm(hidden)
        return normalized

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, hidden_size) from `forward` to (N, vocab_size) float32."""
        if self.lm_head is not None:
            logits: torch.Tensor = self.lm_head(hidden)
        elif self._packed_embeddings is not None:
            logits = packed_linear(hidden, self._packed_embeddings, None)
        else:
            logits = F.linear(hidden, self.embed_tokens)
        return logits.float()
