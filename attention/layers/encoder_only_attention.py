"""Attention of an encoder: every token to every token of its sequence. Nothing is cached."""

from __future__ import annotations

import torch

from attention.backend import AttentionBackend
from attention.errors import AttentionInputError
from attention.layers.attention import Attention
from attention.spec import AttentionSpec


class EncoderOnlyAttention(Attention):
    """Attention in both directions; batches come from `build_encoder_metadata`, and need no cache.

    Args:
        spec: the layer, `AttentionType.ENCODER_ONLY` or `ENCODER`.
        backend: how it attends.
        name: see `Attention`.
        sinks: see `Attention`.

    Raises:
        AttentionInputError: the layer is of another type, or the backend has no attention of encoders.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: type[AttentionBackend],
        name: str,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if spec.attn_type.cached:
            raise AttentionInputError(f"{spec.attn_type} attention has a KV cache: it is no encoder's")
        if spec.attn_type not in backend.capabilities.attention_types:
            raise AttentionInputError(f"{backend.name} has no {spec.attn_type} attention")
        super().__init__(spec, backend, name, sinks)
