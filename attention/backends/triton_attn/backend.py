"""TRITON_ATTN: Baton's own Triton kernels, with every feature but cascade, on every GPU that Triton compiles for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.capability import FLOATS, HOPPER, X86, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.ops.triton.split_parts import make_counters
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, AttentionType, Feature

TRITON_DEVICES = (
    # Triton promises SM 8.0 and newer; it still has code for Turing's matrix instructions, in fp16 only.
    DeviceSupport(DeviceKind.CUDA, low=(7, 5), packages=("triton",), ran_on=(HOPPER,)),
    DeviceSupport(DeviceKind.ROCM, packages=("triton",)),
    DeviceSupport(DeviceKind.XPU, packages=("triton",)),
    DeviceSupport(DeviceKind.CPU, packages=("triton",), ran_on=(X86,)),
)
"""Where the Triton kernels run; on a CPU only interpreted."""

POWERS_OF_TWO = Sizes(only=tuple(2**i for i in range(11)))
"""Block sizes that the Triton kernels accept."""


class Kernel(Enum):
    """Which kernel a batch runs with."""

    DECODE = auto()
    """Split-KV decode: every sequence brings one token."""
    VARLEN = auto()
    """Prefill over the batch's own keys and values, which are all there are."""
    PAGED = auto()
    """Prefill over the cache."""


@dataclass(frozen=True)
class TritonAttnMetadata(AttentionMetadata):
    """A planned batch.

    Attributes:
        kernel: which one runs.
        causal: whether a query is kept from the keys behind it.
        sliding_window: what the kernel applies beside that or the mask; None: nothing.
        mask: see `paged_prefill`; None without masks.
        mask_offsets: (B,) int64, where each sequence's part of it begins.
        alibi_slopes: (Hq,) float32 on the batch's device.
        counters: of `paged_decode`, for the layers of a batch in turn.
    """

    kernel: Kernel
    causal: bool
    sliding_window: int | None
    mask: torch.Tensor | None = None
    mask_offsets: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    counters: torch.Tensor | None = None


class TritonAttnMetadataBuilder(AttentionMetadataBuilder):
    """Chooses the kernel, and writes tree masks out. Nothing here waits for the device."""

    graph_safe_decode = True
    graph_safe_prefill = True

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._slopes = slopes_tensor(spec, device)
        self._counters = make_counters(spec.num_kv_heads, device)

    def build(self, common: CommonAttentionMetadata) -> TritonAttnMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, TritonAttnBackend.capabilities.features, TritonAttnBackend.name)
        mask, offsets, window = None, None, self.spec.sliding_window
        if common.features:
            if self.spec.attn_type is not AttentionType.DECODER and common.tree_mask is not None:
                raise AttentionInputError(f"a tree mask is for decoders, this is {self.spec.attn_type}")
            if not self.spec.attn_type.cached:
                raise AttentionInputError(f"TRITON_ATTN applies masks over a KV cache, {self.spec.attn_type} has none")
            mask, offsets, window = flat_mask(common, window)
        kernel = self._choose(common) if mask is None else Kernel.PAGED
        own = self._slopes, self._counters
        return TritonAttnMetadata(common, kernel, self.spec.causal, window, mask, offsets, *own)

    def _choose(self, common: CommonAttentionMetadata) -> Kernel:
        if not self.spec.attn_type.cached:
            return Kernel.VARLEN
        if common.decode_only:
            return Kernel.DECODE
        fresh = self.spec.attn_type is AttentionType.DECODER and common.query_lens == common.context_lens
        return Kernel.VARLEN if fresh and not self.spec.fp8_cache else Kernel.PAGED


class TritonAttnImpl(AttentionImpl):
    """Stores with one kernel and attends with another, or with two in decode, of which the second merges splits."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`. Waits for nothing, so that a batch's kernels can be captured in a CUDA graph."""
        assert isinstance(metadata, TritonAttnMetadata)
        if output is None:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if query.shape[0] == 0:
            return output
        if kv_cache is not None and key is not None and value is not None:
            from attention.ops.triton.reshape_and_cache import reshape_and_cache

            scales = self.kv_scales
            slots = metadata.common.slot_mapping
            reshape_and_cache(key, value, kv_cache, slots, k_scale=scales.k, v_scale=scales.v)
        if metadata.kernel is Kernel.VARLEN and key is not None and value is not None:
            self._attend_packed(query, key, value, metadata, output)
        elif kv_cache is not None:
            self._attend_paged(query, kv_cache, metadata, output)
        else:
            raise AttentionInputError(f"{self.spec.attn_type} attention without a KV cache needs keys and values")
        return output

    def _attend_packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: TritonAttnMetadata,
        output: torch.Tensor,
    ) -> None:
        from attention.ops.triton.prefill import varlen_prefill

        common = metadata.common
        begins = common.cu_seqlens_q
        varlen_prefill(
            query, key, value, begins, begins, common.max_query_len, output,
            causal=metadata.causal, **self._scores(metadata),
        )  # fmt: skip

    def _attend_paged(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: TritonAttnMetadata, output: torch.Tensor
    ) -> None:
        common = metadata.common
        factors = {"k_scale": self.kv_scales.k, "v_scale": self.kv_scales.v, **self._scores(metadata)}
        if metadata.kernel is Kernel.DECODE:
            from attention.ops.triton.decode import paged_decode

            paged_decode(
                query, kv_cache, common.block_tables, common.seq_lens, common.max_seq_len, output,
                counters=metadata.counters, **factors,
            )  # fmt: skip
        else:
            from attention.ops.triton.prefill import paged_prefill

            paged_prefill(
                query, kv_cache, common.cu_seqlens_q, common.seq_lens, common.block_tables, common.max_query_len,
                output, causal=metadata.causal, mask=metadata.mask, mask_offsets=metadata.mask_offsets, **factors,
            )  # fmt: skip

    def _scores(self, metadata: TritonAttnMetadata) -> dict[str, Any]:
        return {
            "scale": self.spec.scale,
            "sliding_window": metadata.sliding_window,
            "soft_cap": self.spec.logits_soft_cap,
            "alibi_slopes": metadata.alibi_slopes,
            "sinks": self.sinks,
        }


class TritonAttnBackend(AttentionBackend):
    """The Triton kernels of `attention.ops.triton`."""

    name = "TRITON_ATTN"
    impl_class = TritonAttnImpl
    metadata_class = TritonAttnMetadata
    builder_class = TritonAttnMetadataBuilder
    capabilities = Capabilities(
        devices=TRITON_DEVICES,
        dtypes=FLOATS,
        head_sizes=Sizes(high=256),
        block_sizes=POWERS_OF_TWO,
        features=frozenset(Feature) - {Feature.CASCADE},
        refused={Feature.CASCADE: "reads a common prefix once for every sequence"},
        attention_types=tuple(AttentionType),
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """A CPU without Triton's interpreter, and masks where nothing is cached."""
        reasons = []
        if platform.kind is DeviceKind.CPU and not platform.triton_interpreter:
            reasons.append("Triton compiles for no CPU: only in its interpreter (TRITON_INTERPRET=1), for tests")
        masks = needs.features & {Feature.TREE_MASK, Feature.CUSTOM_MASK}
        if masks and not needs.spec.attn_type.cached:
            reasons.append(f"applies masks over a KV cache, {needs.spec.attn_type} has none")
        return reasons


def slopes_tensor(spec: AttentionSpec, device: torch.device) -> torch.Tensor | None:
    """The layer's ALiBi slopes as kernels read them: (Hq,) float32."""
    if spec.alibi_slopes is None:
        return None
    return torch.tensor(spec.alibi_slopes, dtype=torch.float32, device=device)


def flat_mask(
    common: CommonAttentionMetadata, sliding_window: int | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """A batch's mask in the form of `custom_mask`.

    A tree mask is written out: all True, and then the tree at the end of every row. A window bounds the context alone,
    never the tree; one that is narrower than the tree is written out, too.

    Returns:
        The mask, (B,) int64 where each sequence's part of it begins, and the window that is still to be applied.
    """
    device = common.seq_lens.device
    contexts = np.asarray(common.context_lens, dtype=np.int64)
    sizes = np.asarray(common.query_lens, dtype=np.int64) * contexts
    begins = np.concatenate(([0], np.cumsum(sizes)))
    offsets = torch.from_numpy(begins[:-1]).to(device)
    if common.custom_mask is not None:
        return common.custom_mask.to(device).contiguous(), offsets, None
    if common.tree_mask is None:
        raise AttentionInputError("a batch without a mask")
    nodes = common.tree_mask.shape[0]
    node = torch.arange(nodes, device=device)
    mask = torch.ones(int(begins[-1]), dtype=torch.bool, device=device)
    if sliding_window is not None and nodes > sliding_window:
        for begin, end, context in zip(begins, begins[1:], contexts, strict=False):
            behind = context - nodes + node[:, None] - torch.arange(context, device=device)
            torch.lt(behind, sliding_window, out=mask[begin:end].view(nodes, context))
        sliding_window = None
    rows = torch.from_numpy(contexts).to(device)[:, None] * (node + 1) - nodes  # where the tree begins in every row
    mask[offsets[:, None, None] + rows[:, :, None] + node] = common.tree_mask.to(device)
    return mask, offsets, sliding_window
