"""Planning a batch: which kernel, over which keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attention.backend import AttentionMetadata, AttentionMetadataBuilder
from attention.backends.common.libraries import load_library
from attention.backends.flashinfer import choice
from attention.backends.flashinfer.paging import Pages, common_pages, list_pages, written_out
from attention.backends.flashinfer.plans import (
    Cascade,
    Paged,
    Plan,
    Planned,
    PlannedWrapper,
    RaggedPrefill,
    XqaDecode,
    give_room_for_plan,
)
from attention.backends.flashinfer.workspace import device_workspace
from attention.metadata import CommonAttentionMetadata, cumulative_lens
from attention.spec import AttentionSpec, AttentionType

_LAYOUT = "NHD"


@dataclass(frozen=True)
class FlashInferMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        plan: how it runs; None for a batch without tokens.
    """

    plan: Plan | None


class FlashInferMetadataBuilder(AttentionMetadataBuilder):
    """Plans batches; keeps one wrapper of each sort that it needs.

    A wrapper holds one plan: a batch must have run in all layers before the builder plans the next. A `lasting` batch
    of whole sequences gets a wrapper of its own, and is planned once.
    """

    graph_safe_prefill = True

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._library = functools.partial(load_library, "flashinfer", "FLASHINFER")
        self._library()
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self._capability = (properties.major, properties.minor)
        self._sm_count = properties.multi_processor_count
        self._xqa_fits = choice.xqa_fits(self._capability, spec, block_size)
        self.graph_safe_decode = self._xqa_fits  # XQA needs no plan
        self._workspace = device_workspace(self.device)
        self._wrappers: dict[tuple[str, str], PlannedWrapper] = {}
        self._lasting: dict[tuple[int, ...], Planned] = {}

    def build(self, common: CommonAttentionMetadata) -> FlashInferMetadata:
        """See `AttentionMetadataBuilder.build`. Waits for the device only when the batch has a mask, to pack it."""
        return FlashInferMetadata(common, self._plan(common) if sum(common.query_lens) else None)

    def _plan(self, common: CommonAttentionMetadata) -> Plan:
        masked = bool(common.features)
        fresh = common.query_lens == common.context_lens and self.spec.attn_type is not AttentionType.ENCODER_DECODER
        if not self.spec.attn_type.cached or (fresh and not masked and not self.spec.fp8_cache):
            return self._ragged(common)
        decode = common.decode_only and not masked
        if choice.cascade_pays(common, self.spec, xqa=decode and self._xqa_fits):
            return self._cascade(common)
        if decode:
            return self._xqa(common) if self._xqa_fits else self._decode(list_pages(common, self.block_size))
        pages = list_pages(common, self.block_size)
        mask = written_out(common, self.spec.sliding_window)
        return self._paged("prefill", cumulative_lens(common.query_lens), pages, self.spec.causal, mask)

    def _ragged(self, common: CommonAttentionMetadata) -> RaggedPrefill:
        if not common.lasting:
            kernel = choice.prefill_kernel(self._capability, self.spec, masked=False)
            return RaggedPrefill(self._plan_ragged(self._wrapper("ragged", kernel), common), common)
        if common.query_lens not in self._lasting:
            kernel = choice.prefill_kernel(self._capability, self.spec, masked=False)
            wrapper = give_room_for_plan(self._make("ragged", kernel), self._workspace.scratch)
            self._lasting[common.query_lens] = self._plan_ragged(wrapper, common)
        return RaggedPrefill(self._lasting[common.query_lens], common)

    def _plan_ragged(self, wrapper: PlannedWrapper, common: CommonAttentionMetadata) -> Planned:
        offsets = cumulative_lens(common.query_lens)
        spec = self.spec
        return wrapper.plan(
            offsets,
            offsets,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            causal=spec.causal,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
            **self._scores(),
        )

    def _paged(
        self, sort: str, offsets: torch.Tensor, pages: Pages, causal: bool, mask: torch.Tensor | None = None
    ) -> Paged:
        kernel = choice.prefill_kernel(self._capability, self.spec, mask is not None)
        scores = self._scores()
        if mask is not None:
            scores["window_left"] = -1  # it is in the mask
        planned = self._wrapper(sort, kernel).plan(
            offsets,
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_size,
            self.block_size,
            causal=causal and mask is None,
            custom_mask=mask,
            q_data_type=self.dtype,
            kv_data_type=choice.kv_dtype(self.spec, self.dtype),
            **scores,
        )
        return Paged(planned, self.spec.fp8_cache)

    def _cascade(self, common: CommonAttentionMetadata) -> Cascade:
        offsets = cumulative_lens(common.query_lens)
        everyone = torch.tensor([0, int(offsets[-1])], dtype=torch.int32)
        rest = list_pages(common, self.block_size, common.common_prefix_len // self.block_size)
        return Cascade(
            prefix=self._paged("prefix", everyone, common_pages(common, self.block_size), causal=False),
            suffix=self._decode(rest) if common.decode_only else self._paged("suffix", offsets, rest, self.spec.causal),
            merge=self._library("flashinfer.cascade").merge_state_in_place,
        )

    def _decode(self, pages: Pages) -> Paged:
        planned = self._wrapper("decode", "fa2").plan(
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_size,
            self.block_size,
            q_data_type=self.dtype,
            kv_data_type=choice.kv_dtype(self.spec, self.dtype),
            **self._scores(),
        )
        return Paged(planned, self.spec.fp8_cache)

    def _xqa(self, common: CommonAttentionMetadata) -> XqaDecode:
        return XqaDecode(
            xqa=self._library("flashinfer.xqa").xqa,
            block_tables=common.block_tables,
            seq_lens=common.seq_lens.view(torch.uint32).unsqueeze(1),
            window=self.spec.sliding_window or 0,
            scale=self.spec.scale,
            scratch=self._workspace.scratch,
            semaphores=self._workspace.semaphores.view(torch.uint32),
            sm_count=self._sm_count,
        )

    def _scores(self) -> dict[str, Any]:
        """How queries score keys, as all wrappers are told."""
        return {
            "pos_encoding_mode": "NONE" if self.spec.alibi_slopes is None else "ALIBI",
            "window_left": choice.window_left(self.spec),
            "logits_soft_cap": self.spec.logits_soft_cap,
            "sm_scale": self.spec.scale,
        }

    def _wrapper(self, sort: str, kernel: str) -> PlannedWrapper:
        if (sort, kernel) not in self._wrappers:
            self._wrappers[sort, kernel] = PlannedWrapper(self._make(sort, kernel))
        return self._wrappers[sort, kernel]

    def _make(self, sort: str, kernel: str) -> Any:
        scratch = self._workspace.scratch
        if sort == "decode":
            on_tensor_cores = not choice.decodes_on_cuda_cores(self.spec)
            wrapper = self._library("flashinfer.decode").BatchDecodeWithPagedKVCacheWrapper
            return wrapper(scratch, _LAYOUT, use_tensor_cores=on_tensor_cores, backend=kernel)
        prefill = self._library("flashinfer.prefill")
        if sort == "ragged":
            return prefill.BatchPrefillWithRaggedKVCacheWrapper(scratch, _LAYOUT, backend=kernel)
        return prefill.BatchPrefillWithPagedKVCacheWrapper(scratch, _LAYOUT, backend=kernel)
