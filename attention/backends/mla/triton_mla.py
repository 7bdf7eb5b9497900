"""TRITON_MLA: latent attention by Baton's own Triton kernels, on every GPU that Triton compiles for."""

from __future__ import annotations

from typing import Any

import torch

from attention.backends.mla.expanding import DecodeBatch, Expanded, ExpandingBackend, ExpandingImpl, Packed
from attention.backends.triton_attn.backend import POWERS_OF_TWO, TRITON_DEVICES
from attention.capability import FLOATS, Capabilities
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, Feature

_MAX_LATENT = 576
"""What a tile of the decode kernel has room for."""


class TritonMLAImpl(ExpandingImpl):
    """One layer's latent attention. The prefill kernel reads the two parts of keys where they are."""

    joins_keys = False

    def attend(
        self, query: torch.Tensor, keys: Expanded, call: Any, output: torch.Tensor, wants_lse: bool
    ) -> torch.Tensor | None:
        """See `ExpandingImpl.attend`."""
        from attention.ops.triton.latent.prefill import latent_prefill

        assert isinstance(call, Packed)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if wants_lse else None
        latent_prefill(
            query,
            keys.key,
            keys.rotary_key,
            keys.value,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            max(call.query_lens),
            output,
            scale=self.spec.scale,
            causal=call.causal,
            lse=lse,
        )
        return lse

    def attend_latents(
        self,
        query: torch.Tensor,
        rotary_query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: DecodeBatch,
        call: Any,
        output: torch.Tensor,
    ) -> None:
        """See `ExpandingImpl.attend_latents`."""
        from attention.ops.triton.latent.decode import latent_decode

        latent_decode(
            query,
            rotary_query,
            kv_cache,
            batch.block_tables,
            batch.seq_lens,
            max(batch.context_lens),
            output,
            scale=self.spec.scale,
            cache_scale=self.kv_scales.k,
        )


class TritonMLABackend(ExpandingBackend):
    """Latent attention in Triton, prefill and decode."""

    name = "TRITON_MLA"
    impl_class = TritonMLAImpl
    capabilities = Capabilities(
        devices=TRITON_DEVICES,
        dtypes=FLOATS,
        block_sizes=POWERS_OF_TWO,
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.FP8_KV}),
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """A CPU without Triton's interpreter, and latents that are larger than a tile."""
        reasons = []
        if platform.kind is DeviceKind.CPU and not platform.triton_interpreter:
            reasons.append("Triton compiles for no CPU: only in its interpreter (TRITON_INTERPRET=1), for tests")
        if needs.spec.head_size > _MAX_LATENT:
            reasons.append(f"a latent of {needs.spec.head_size} numbers, at most {_MAX_LATENT}")
        return reasons
