"""FLASHINFER_MLA: FlashInfer's latent attention (https://github.com/flashinfer-ai/flashinfer).

Prefill is its ragged kernel over expanded keys of 192 and values of 128. Decode is `BatchMLAPagedAttentionWrapper`, fa3
on SM 9.0 and fa2 elsewhere, and on SM 10.x `trtllm_batch_decode_with_kv_cache_mla`, which needs no plan.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.flashinfer.paging import list_pages
from attention.backends.flashinfer.plans import Planned, PlannedWrapper, give_room_for_plan
from attention.backends.flashinfer.workspace import device_workspace
from attention.backends.mla.expanding import (
    DecodeBatch,
    Expanded,
    ExpandingBackend,
    ExpandingBuilder,
    ExpandingImpl,
    Packed,
)
from attention.capability import HALVES, HOPPER, Capabilities, DeviceSupport, Sizes
from attention.metadata import cumulative_lens
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, Feature

NAME = "FLASHINFER_MLA"
_HOPPER = (9, 0)
_BLACKWELL = (10, 0)
_BLACKWELL_BLOCKS = (32, 64)


@dataclass(frozen=True)
class PagedDecode:
    """A planned decode.

    Attributes:
        planned: of the wrapper.
        fp8: whether the cache is FP8.
    """

    planned: Planned
    fp8: bool


class FlashInferMLABuilder(ExpandingBuilder):
    """Plans batches; keeps a wrapper for each call of a batch, and for each batch that lasts."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._library = functools.partial(load_library, "flashinfer", NAME)
        self._library()
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(self.device)
        self._kernel = "fa3" if capability[0] == _HOPPER[0] else "fa2"
        self._blackwell = capability[0] == _BLACKWELL[0]
        self.graph_safe_decode = self._blackwell  # the wrapper's plan holds the lengths of a batch
        self._scratch = device_workspace(self.device).scratch
        self._ragged: list[PlannedWrapper] = []
        self._lasting: dict[tuple[int, ...], Planned] = {}
        self._decode: PlannedWrapper | None = None

    def plan_attention(self, packed: Packed, index: int) -> Planned:
        """See `ExpandingBuilder.plan_attention`."""
        if packed.lasting:
            if packed.query_lens not in self._lasting:
                wrapper = give_room_for_plan(self._make_ragged(), self._scratch)
                self._lasting[packed.query_lens] = self._plan_ragged(wrapper, packed)
            return self._lasting[packed.query_lens]
        while len(self._ragged) <= index:
            self._ragged.append(PlannedWrapper(self._make_ragged()))
        return self._plan_ragged(self._ragged[index], packed)

    def plan_decode(self, batch: DecodeBatch) -> PagedDecode | None:
        """See `ExpandingBuilder.plan_decode`."""
        if self._blackwell:
            return None
        if self._decode is None:
            wrapper = self._library("flashinfer.mla").BatchMLAPagedAttentionWrapper
            self._decode = PlannedWrapper(wrapper(self._scratch, backend=self._kernel))
        mla = self.spec.mla
        assert mla is not None
        pages = list_pages(batch, self.block_size)
        fp8 = self.spec.fp8_cache
        planned = self._decode.plan(
            torch.arange(batch.num_seqs + 1, dtype=torch.int32),
            pages.indptr,
            pages.indices,
            torch.tensor(batch.context_lens, dtype=torch.int32),
            self.spec.num_heads,
            mla.kv_lora_rank,
            mla.qk_rope_head_dim,
            self.block_size,
            False,
            self.spec.scale,
            self.dtype,
            torch.float8_e4m3fn if fp8 else self.dtype,
        )
        return PagedDecode(planned, fp8)

    def _make_ragged(self) -> Any:
        wrapper = self._library("flashinfer.prefill").BatchPrefillWithRaggedKVCacheWrapper
        return wrapper(self._scratch, "NHD", backend=self._kernel)

    def _plan_ragged(self, wrapper: PlannedWrapper, packed: Packed) -> Planned:
        mla = self.spec.mla
        assert mla is not None
        return wrapper.plan(
            cumulative_lens(packed.query_lens),
            cumulative_lens(packed.key_lens),
            self.spec.num_heads,
            self.spec.num_heads,
            mla.qk_nope_head_dim + mla.qk_rope_head_dim,
            head_dim_vo=mla.v_head_dim,
            causal=packed.causal,
            sm_scale=self.spec.scale,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )


class FlashInferMLAImpl(ExpandingImpl):
    """One layer's latent attention."""

    def attend(
        self, query: torch.Tensor, keys: Expanded, call: Any, output: torch.Tensor, wants_lse: bool
    ) -> torch.Tensor | None:
        """See `ExpandingImpl.attend`."""
        assert isinstance(call, Planned)
        lse = call.run(output, wants_lse, query, keys.key, keys.value)
        return None if lse is None else lse.mul_(math.log(2.0))

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
        if isinstance(call, PagedDecode):
            scales = {"ckv_scale": self.kv_scales.k, "kpe_scale": self.kv_scales.k} if call.fp8 else {}
            call.planned.run(output, False, query, rotary_query, kv_cache[..., :rank], kv_cache[..., rank:], **scales)
            return
        device = kv_cache.device
        load_library("flashinfer", NAME, "flashinfer.mla").trtllm_batch_decode_with_kv_cache_mla(
            torch.cat((query, rotary_query), dim=-1).unsqueeze(1),
            kv_cache,
            device_workspace(device).scratch,
            self.mla.qk_nope_head_dim,
            rank,
            self.mla.qk_rope_head_dim,
            batch.block_tables,
            batch.seq_lens,
            max(batch.context_lens),
            out=output.unsqueeze(1),
            bmm1_scale=self.spec.scale * self.kv_scales.k,
            bmm2_scale=self.kv_scales.k,
        )


class FlashInferMLABackend(ExpandingBackend):
    """FlashInfer's latent attention, prefill and decode."""

    name = NAME
    impl_class = FlashInferMLAImpl
    builder_class = FlashInferMLABuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(8, 0), high=(11, 0), packages=("flashinfer",), ran_on=(HOPPER,)),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.FP8_KV}),
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Heads of other sizes than DeepSeek's, FP8 on old hardware, and the block sizes of SM 10.x."""
        capability = platform.capability
        blackwell = capability is not None and capability >= _BLACKWELL
        mla, reasons = needs.spec.mla, []
        if mla is not None and (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) != (128, 64, 128):
            reasons.append(
                f"heads of {mla.qk_nope_head_dim} + {mla.qk_rope_head_dim} and values of {mla.v_head_dim}: "
                "FlashInfer's kernels are for 128 + 64 and 128"
            )
        if Feature.FP8_KV in needs.spec.features and capability is not None and capability < _HOPPER:
            reasons.append("an FP8 cache of latents needs SM 9.0 or newer")
        if Feature.FP8_KV in needs.spec.features and capability == _HOPPER and needs.dtype != torch.bfloat16:
            reasons.append(f"an FP8 cache of latents goes with bfloat16 queries on SM 9.0, not {needs.dtype}")
        if blackwell and needs.block_size not in _BLACKWELL_BLOCKS:
            reasons.append(f"block size {needs.block_size} is not one of: 32, 64 on SM 10.x")
        return reasons
