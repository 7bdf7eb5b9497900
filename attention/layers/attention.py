"""The attention layer of a model: a module around a backend's implementation."""

from __future__ import annotations

import torch
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, KVScales
from attention.forward_context import ForwardContext, current_context
from attention.fp8 import calibrate
from attention.spec import AttentionSpec
from attention.unified_attention import unified_attention


class Attention(nn.Module):
    """Paged attention. Batch, plan and cache come from `forward_context`.

    Under `torch.compile` it is one call of the operator `baton::unified_attention`; else the same is called directly.

    Args:
        spec: the layer.
        backend: how it attends.
        name: unique in the model; `ForwardContext` finds the layer, its batch and its cache by it.
        sinks: (Hq,) float32, where `spec.has_sinks`; may be filled later, in place.
        kv_scales: of an FP8 cache; None: found from the first tokens that the layer sees.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: type[AttentionBackend],
        name: str,
        sinks: torch.Tensor | None = None,
        kv_scales: KVScales | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.name = name
        self.sinks = nn.Parameter(sinks, requires_grad=False) if sinks is not None else None
        self.impl = backend.impl_class(spec, self.sinks)
        if kv_scales is not None:
            self.impl.kv_scales = kv_scales
        self._needs_scales = spec.fp8_cache and kv_scales is None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: (T, Hq, D) to (T, Hq, D); see `AttentionImpl.forward` for the arguments."""
        if torch.compiler.is_compiling():
            if output is None:
                output = torch.empty_like(query, memory_format=torch.contiguous_format)
            unified_attention(query, key, value, output, self.name)
            return output
        return self.attend(current_context(), query, key, value, output)

    def attend(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the implementation between the connector's two hooks.

        Raises:
            AttentionInputError: the context has no batch for this layer, or no cache where it needs one.
        """

        def run(metadata: AttentionMetadata, kv_cache: torch.Tensor | None) -> torch.Tensor:
            if self._needs_scales and key is not None and value is not None:
                self.impl.kv_scales = calibrate(key, value)
                self._needs_scales = False
            return self.impl.forward(query, key, value, kv_cache, metadata, output)

        return context.run_layer(self.name, self.spec.attn_type.cached, run)
