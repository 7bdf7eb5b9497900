"""FLASH_ATTN_MLA: FlashAttention 3 and 4 (https://github.com/Dao-AILab/flash-attention).

Prefill is the varlen kernel over expanded keys of 192 and values of 128. Decode is the paged kernel with the rotary
parts as queries and keys and the absorbed queries as `qv`, which FlashAttention 3 has on SM 9.0 and 4 on SM 10.x.
"""

from __future__ import annotations

from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.flash_attn.calls import Call
from attention.backends.flash_attn.versions import PROVIDERS, FlashAttnVersion, Provider
from attention.backends.mla.expanding import DecodeBatch, Expanded, ExpandingBackend, ExpandingImpl, Packed
from attention.capability import HALVES, HOPPER, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionBackendError
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, Feature, Phase

NAME = "FLASH_ATTN_MLA"
_BLACKWELL = (10, 0)


class FlashAttnMLAImpl(ExpandingImpl):
    """One layer's latent attention."""

    def __init__(self, spec: AttentionSpec, kv_b_proj: torch.Tensor) -> None:
        super().__init__(spec, kv_b_proj)
        usable = usable_providers(Platform.of(kv_b_proj.device), spec)
        if not usable:
            raise AttentionBackendError(f"{NAME}: neither FlashAttention 3 nor 4 is usable here")
        self._provider = usable[0]

    def attend(
        self, query: torch.Tensor, keys: Expanded, call: Any, output: torch.Tensor, wants_lse: bool
    ) -> torch.Tensor | None:
        """See `ExpandingImpl.attend`."""
        assert isinstance(call, Packed)
        lse = self._provider.kernel(
            Call(
                query=query,
                key=keys.key,
                value=keys.value,
                output=output,
                cu_seqlens_q=call.cu_seqlens_q,
                cu_seqlens_k=call.cu_seqlens_k,
                max_query_len=max(call.query_lens),
                max_seq_len=max(call.key_lens),
                seq_lens=call.cu_seqlens_k,
                block_tables=None,
                scale=self.spec.scale,
                causal=call.causal,
                window=(-1, -1),
                soft_cap=0.0,
                alibi_slopes=None,
                sinks=None,
                wants_lse=wants_lse,
            )
        )
        return None if lse is None else lse.T

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
        rank = self.mla.kv_lora_rank
        latents, rotary_keys = kv_cache[..., :rank].unsqueeze(2), kv_cache[..., rank:].unsqueeze(2)
        same = {"qv": query.unsqueeze(1), "softmax_scale": self.spec.scale, "causal": True}
        if self._provider.version is FlashAttnVersion.FA4:
            library = load_library("flash_attn_4", NAME, "flash_attn.cute.interface")
            attended = library.flash_attn_varlen_func(
                rotary_query.unsqueeze(1),
                rotary_keys,
                latents,
                seqused_k=batch.seq_lens,
                page_table=batch.block_tables,
                max_seqlen_k=max(batch.context_lens),
                **same,
            )
        else:
            attended = load_library("flash_attn_3", NAME).flash_attn_with_kvcache(
                rotary_query.unsqueeze(1),
                rotary_keys,
                latents,
                cache_seqlens=batch.seq_lens,
                page_table=batch.block_tables,
                **same,
            )
        attended = attended[0] if isinstance(attended, tuple) else attended
        output.copy_(attended.squeeze(1))


class FlashAttnMLABackend(ExpandingBackend):
    """FlashAttention's latent attention, prefill and decode."""

    name = NAME
    impl_class = FlashAttnMLAImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(
                DeviceKind.CUDA,
                low=(9, 0),
                high=(12, 0),
                any_of=("flash_attn_3", "flash_attn_4"),
                ran_on=(HOPPER,),  # prompts, by FlashAttention 4
            ),
        ),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(16, step=16),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "FlashAttention has no FP8 for latent attention"},
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Packages that are there and not usable, other sizes of heads, and decode where a package has none."""
        mla, reasons = needs.spec.mla, []
        if mla is not None and (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) != (128, 64, 128):
            reasons.append(
                f"heads of {mla.qk_nope_head_dim} + {mla.qk_rope_head_dim} and values of {mla.v_head_dim}: "
                "FlashAttention's kernels are for 128 + 64 and 128"
            )
        if platform.kind is not DeviceKind.CUDA:
            return reasons
        usable = usable_providers(platform, needs.spec)
        decodes = [provider for provider in usable if _decodes(provider, platform)]
        if not usable:
            against = [reason for provider in _new_ones() for reason in provider.refuse(platform, needs.spec)]
            reasons += list(dict.fromkeys(against))
        elif needs.phase is not Phase.PREFILL and usable[0] not in decodes:
            reasons.append(f"{usable[0]} has no latent attention over a paged cache on {platform.sm}")
        return reasons


def usable_providers(platform: Platform, spec: AttentionSpec) -> list[Provider]:
    """The packages of FlashAttention 3 and 4 that expand keys of 192 and values of 128 there, best first."""
    return [provider for provider in _new_ones() if not provider.refuse(platform, spec)]


def _new_ones() -> list[Provider]:
    new = (FlashAttnVersion.FA3, FlashAttnVersion.FA4)
    return [p for p in PROVIDERS if p.version in new and p.package in ("flash_attn_3", "flash_attn_4")]


def _decodes(provider: Provider, platform: Platform) -> bool:
    blackwell = platform.capability is not None and platform.capability >= _BLACKWELL
    return blackwell if provider.version is FlashAttnVersion.FA4 else not blackwell
