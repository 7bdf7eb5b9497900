"""CUTLASS_MLA: CUTLASS' decode kernel for Blackwell, as FlashInfer carries it.

`BatchMLAPagedAttentionWrapper(backend="cutlass")`: SM 10.x, a latent of 512 + 64, at most 128 heads, blocks of 128. It
needs no plan: lengths and page table are read on the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.flashinfer.workspace import device_workspace
from attention.backends.mla.decoding import DecodingImpl
from attention.backends.mla.expanding import DecodeBatch, ExpandingBackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, Feature, Phase

NAME = "CUTLASS_MLA"
MAX_HEADS = 128
"""Query heads of one tile of the kernel."""


class CutlassMLAImpl(DecodingImpl):
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
        """See `ExpandingImpl.attend_latents`. The kernel scales by 1 / sqrt(192): queries bring what is left."""
        rank = self.mla.kv_lora_rank
        factor = self.spec.scale * (self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim) ** 0.5
        queries = self.joined(query)
        if abs(factor - 1.0) > 1e-6:
            queries = queries * factor
        missing = MAX_HEADS - queries.shape[1]
        if missing:
            queries = torch.nn.functional.pad(queries, (0, 0, 0, missing))
        attended = _wrapper(kv_cache.device).run(
            queries[..., :rank],
            queries[..., rank:],
            kv_cache[..., :rank],
            kv_cache[..., rank:],
            kv_len=batch.seq_lens,
            page_table=batch.block_tables,
        )
        output.copy_(attended[:, : output.shape[1]])


class CutlassMLABackend(ExpandingBackend):
    """CUTLASS' latent attention on Blackwell, decode only."""

    name = NAME
    impl_class = CutlassMLAImpl
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(10, 0), high=(11, 0), packages=("flashinfer",)),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(only=(128,)),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "the kernel's FP8 wants FP8 queries, too"},
        phases=(Phase.DECODE,),
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Heads that one tile of the kernel has no room for."""
        heads = needs.spec.num_heads
        return [f"{heads} query heads, at most {MAX_HEADS}"] if heads > MAX_HEADS else []


@functools.cache
def _wrapper(device: torch.device) -> Any:
    library = load_library("flashinfer", NAME, "flashinfer.mla")
    return library.BatchMLAPagedAttentionWrapper(device_workspace(device).scratch, backend="cutlass")
