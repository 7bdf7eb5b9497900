"""ROCM_AITER_MLA: AMD's decode kernel (https://github.com/ROCm/aiter), which reads a cache token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.mla.decoding import DecodingImpl
from attention.backends.mla.expanding import DecodeBatch, ExpandingBackend, ExpandingBuilder
from attention.capability import Capabilities, DeviceSupport, Sizes
from attention.kv_cache import context_slots
from attention.metadata import cumulative_lens
from attention.platform import DeviceKind
from attention.spec import Feature, Phase

NAME = "ROCM_AITER_MLA"


@dataclass(frozen=True)
class TokenPages:
    """A batch as the kernel reads it, each cached token being a page.

    Attributes:
        qo_indptr: (B + 1,) int32.
        kv_indptr: (B + 1,) int32.
        kv_indices: (sum of lengths,) int32, slots.
        last_page_lens: (B,) int32, ones.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_lens: torch.Tensor


class RocmAiterMLABuilder(ExpandingBuilder):
    """Lists the slots of every token, for which lengths must be known: its decode is not replayed."""

    graph_safe_decode = False

    def plan_decode(self, batch: DecodeBatch) -> TokenPages:
        """See `ExpandingBuilder.plan_decode`."""
        count, device = batch.num_seqs, batch.block_tables.device
        slots = context_slots(batch.block_tables, range(count), [0] * count, batch.context_lens, self.block_size)
        return TokenPages(
            torch.arange(count + 1, dtype=torch.int32, device=device),
            cumulative_lens(batch.context_lens, device),
            slots.int(),
            torch.ones(count, dtype=torch.int32, device=device),
        )


class RocmAiterMLAImpl(DecodingImpl):
    """One layer's decode steps."""

    backend = NAME

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
        assert isinstance(call, TokenPages)
        load_library("aiter", NAME, "aiter.mla").mla_decode_fwd(
            self.joined(query),
            kv_cache.view(-1, 1, 1, kv_cache.shape[-1]),
            output,
            call.qo_indptr,
            call.kv_indptr,
            call.kv_indices,
            call.last_page_lens,
            1,
            sm_scale=self.spec.scale,
        )


class RocmAiterMLABackend(ExpandingBackend):
    """AITER's latent attention on AMD's data-center GPUs, decode only."""

    name = NAME
    impl_class = RocmAiterMLAImpl
    builder_class = RocmAiterMLABuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.ROCM, archs=("gfx942", "gfx950"), packages=("aiter",)),),
        dtypes=(torch.bfloat16,),
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "AITER's kernel for FP8 latents wants FP8 queries, too"},
        phases=(Phase.DECODE,),
        mla=True,
    )
