"""ROCM_AITER_FA: AMD's aiter on Instinct MI300 and MI350 (https://github.com/ROCm/aiter).

Prefill: `aiter.flash_attn_varlen_func` (assembly or Composable Kernel, by shape) over contiguous keys; a prompt with a
cached prefix first copies its keys and values out of the cache, which costs writing and reading them once more per
layer. Decode: `aiter.paged_attention_v1`, which reads the paged cache by its strides, in partitions of 256 tokens, and
skips sequences with more than one query, so that decoding sequences of a mixed batch are not copied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, refuse_masks
from attention.backends.common.batch_split import BatchSplit, PrefillPart, gather_kv, kv_rows, put, split_batch, take
from attention.backends.common.libraries import load_library
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.errors import AttentionInputError
from attention.kv_cache import reshape_and_cache
from attention.metadata import CommonAttentionMetadata
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, AttentionSpec, Feature

PARTITION_SIZE = 256
"""Keys of one sequence that one program of the decode kernel reads; fixed in the kernel."""


@dataclass(frozen=True)
class AiterMetadata(AttentionMetadata):
    """A batch as aiter's kernels take it.

    Attributes:
        split: its two parts.
        workspace: uint8, what the decode kernel needs between its partitions and their reduction; None: no sequence
            decodes.
    """

    split: BatchSplit
    workspace: torch.Tensor | None


class AiterBuilder(AttentionMetadataBuilder):
    """Splits batches and keeps the decode kernel's workspace, which grows to the largest batch seen."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)

    def build(self, common: CommonAttentionMetadata) -> AiterMetadata:
        """See `AttentionMetadataBuilder.build`."""
        refuse_masks(common, RocmAiterFaBackend.capabilities.features, RocmAiterFaBackend.name)
        split = split_batch(common, self.block_size)
        if split.decode is None:
            return AiterMetadata(common, split, None)
        size = workspace_bytes(common.num_seqs, self.spec, common.max_seq_len, self.dtype)
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        return AiterMetadata(common, split, self._workspace)


class AiterImpl(AttentionImpl):
    """One layer through aiter. Importing aiter registers its operators.

    Raises:
        AttentionBackendError: aiter is missing.
    """

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        super().__init__(spec, sinks)
        self._aiter: Any = load_library("aiter", RocmAiterFaBackend.name)
        self._constants: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `metadata` is an `AiterMetadata`."""
        batch = cast(AiterMetadata, metadata)
        if kv_cache is None:
            raise AttentionInputError("ROCM_AITER_FA needs a KV cache")
        if key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, batch.common.slot_mapping)
        if output is None:
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        one, slopes = self._constants_on(query.device)
        if batch.workspace is not None:
            self._decode(query, kv_cache, batch, batch.workspace, one, slopes, output)
        if batch.split.prefill is not None:
            self._prefill(query, key, value, kv_cache, batch.split.prefill, slopes, output)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AiterMetadata,
        workspace: torch.Tensor,
        one: torch.Tensor,
        slopes: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """The kernel takes packed rows only; the rows of sequences that do not decode it leaves alone."""
        common = batch.common
        packed = (
            output if output.is_contiguous() else torch.empty(output.shape, dtype=output.dtype, device=output.device)
        )
        self._aiter.paged_attention_v1(
            packed,
            workspace,
            query.contiguous(),
            kv_cache[:, 0],
            kv_cache[:, 1],
            self.spec.scale,
            common.block_tables,
            common.cu_seqlens_q,
            common.seq_lens,
            common.max_seq_len,
            slopes,
            "auto",
            "NHD",
            self.spec.logits_soft_cap or 0.0,
            one,
            one,
            None,
            PARTITION_SIZE,
        )
        if packed is not output:
            output.copy_(packed)

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        part: PrefillPart,
        slopes: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        if part.whole and key is not None and value is not None:
            keys, values = take(key, part.tokens), take(value, part.tokens)
        else:
            keys, values = gather_kv(kv_cache, kv_rows(part.slots, kv_cache.shape[2]))
        direct = output if part.tokens is None and output.is_contiguous() else None
        attended = self._aiter.flash_attn_varlen_func(
            take(query, part.tokens),
            keys,
            values,
            part.cu_seqlens_q,
            part.cu_seqlens_k,
            max(part.query_lens),
            max(part.context_lens),
            softmax_scale=self.spec.scale,
            logits_soft_cap=self.spec.logits_soft_cap or 0.0,
            causal=True,
            alibi_slopes=slopes,
            out=direct,
        )
        if direct is None:
            put(output, part.tokens, attended)

    def _constants_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scale of a cache that is not quantised, and the ALiBi slopes, made once."""
        if self._constants is None:
            slopes = self.spec.alibi_slopes
            self._constants = (
                torch.ones(1, dtype=torch.float32, device=device),
                None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device),
            )
        return self._constants


class RocmAiterFaBackend(AttentionBackend):
    """AMD's aiter on gfx942 and gfx950."""

    name = "ROCM_AITER_FA"
    impl_class = AiterImpl
    metadata_class = AiterMetadata
    builder_class = AiterBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.ROCM, archs=("gfx942", "gfx950"), packages=("aiter",)),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(64, 128)),
        block_sizes=Sizes(only=(16, 32)),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.ALIBI, Feature.SOFT_CAP}),
        refused={
            Feature.SLIDING_WINDOW: "aiter releases differ in whether paged_attention_v1 takes a sliding window",
            Feature.FP8_KV: "aiter reads FP8 as e4m3fnuz on gfx942, the cache holds e4m3fn",
        },
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """See `AttentionBackend.refuse_more`: a program of the decode kernel has 16 query heads; soft caps differ."""
        reasons = []
        group = needs.spec.num_heads // max(1, needs.spec.num_kv_heads)
        if group > 16:
            reasons.append(f"{group} query heads for each key/value head, at most 16")
        if needs.spec.alibi_slopes is not None and needs.spec.logits_soft_cap is not None:
            reasons.append("aiter adds ALiBi before the soft cap, not after it")
        return reasons


def workspace_bytes(num_seqs: int, spec: AttentionSpec, max_seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of `paged_attention_v1`'s workspace: for every partition its output, and its softmax's sum and maximum."""
    partitions = num_seqs * spec.num_heads * -(-max_seq_len // PARTITION_SIZE)
    return partitions * (spec.head_size * dtype.itemsize + 2 * torch.float32.itemsize)
