"""The attention layer of a model with multi-head latent attention: a module around a backend's implementation."""

from __future__ import annotations

import torch
from torch import nn

from attention.backend import AttentionBackend, AttentionMetadata, KVScales
from attention.errors import AttentionBackendError
from attention.forward_context import ForwardContext, current_context
from attention.fp8 import calibrate
from attention.spec import AttentionSpec
from attention.unified_attention import unified_attention


class MLAAttention(nn.Module):
    """Paged latent attention. Batch, plan and cache come from `forward_context`.

    Under `torch.compile` it is one call of the operator `baton::unified_attention`, with the latents and the rotary
    keys in the places of keys and values; else the same is called directly.

    Args:
        spec: the layer, with `mla` set.
        backend: how it attends, one for latent attention.
        name: unique in the model; `ForwardContext` finds the layer, its batch and its cache by it.
        kv_b_proj: (Hq * (qk_nope_head_dim + v_head_dim), kv_lora_rank); may be filled later, in place.
        kv_scales: of an FP8 cache, `k` being the latent's; None: found from the first tokens that the layer sees.

    Raises:
        AttentionBackendError: a backend that is not for latent attention, or whose kernel is missing.
        AttentionInputError: a weight that does not fit the layer.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        backend: type[AttentionBackend],
        name: str,
        kv_b_proj: torch.Tensor,
        kv_scales: KVScales | None = None,
    ) -> None:
        super().__init__()
        if not backend.capabilities.mla:
            raise AttentionBackendError(f"{backend.name} is not made for latent attention")
        self.spec = spec
        self.backend = backend
        self.name = name
        self.kv_b_proj = nn.Parameter(kv_b_proj, requires_grad=False)
        self.impl = backend.impl_class(spec, self.kv_b_proj)
        if kv_scales is not None:
            self.impl.kv_scales = kv_scales
        self._needs_scales = spec.fp8_cache and kv_scales is None

    def forward(
        self,
        query: torch.Tensor,
        kv_c: torch.Tensor | None,
        k_pe: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; see `MLAImpl.forward` for the arguments.

        Args:
            query: (T, Hq, qk_nope_head_dim + qk_rope_head_dim).
            kv_c: (T, kv_lora_rank), the normalised latents.
            k_pe: (T, qk_rope_head_dim), the rotated keys.
            output: (T, Hq, v_head_dim), written and returned when given.

        Returns:
            (T, Hq, v_head_dim).
        """
        if torch.compiler.is_compiling():
            if output is None:
                assert self.spec.mla is not None
                output = query.new_empty(query.shape[0], self.spec.num_heads, self.spec.mla.v_head_dim)
            unified_attention(query, kv_c, k_pe, output, self.name)
            return output
        return self.attend(current_context(), query, kv_c, k_pe, output)

    def attend(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        kv_c: torch.Tensor | None,
        k_pe: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the implementation between the connector's two hooks.

        Raises:
            AttentionInputError: the context has no batch or no cache for this layer.
        """

        def run(metadata: AttentionMetadata, kv_cache: torch.Tensor | None) -> torch.Tensor:
            if self._needs_scales and kv_c is not None and k_pe is not None:
                latent = torch.cat((kv_c, k_pe), dim=-1)
                self.impl.kv_scales = calibrate(latent, latent)
                self._needs_scales = False
            return self.impl.forward(query, kv_c, k_pe, kv_cache, metadata, output)

        return context.run_layer(self.name, needs_cache=True, attend=run)
