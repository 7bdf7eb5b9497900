"""TORCH_SDPA: PyTorch's own attention, one sequence at a time. Plain, and the yardstick for the others."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attention.backends.torch_sdpa.kernels import DotProduct, Kernel, WrittenOut
from attention.backends.torch_sdpa.plan import Limits, Planner, SdpaMetadata, check_batch, needs_scores
from attention.backends.torch_sdpa.run import Finish, Keys, run
from attention.capability import FLOATS, HOPPER, X86, Capabilities, DeviceSupport
from attention.errors import AttentionInputError
from attention.kv_cache import store_rows
from attention.metadata import CommonAttentionMetadata
from attention.ops.merge_attn_states import apply_sinks
from attention.ops.torch_attention import Scores
from attention.platform import DeviceKind
from attention.spec import AttentionSpec, AttentionType, Feature


class TorchSdpaImpl(AttentionImpl):
    """One layer's attention through `scaled_dot_product_attention`, or with scores written out where it cannot."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`.

        Raises:
            AttentionInputError: there are neither keys nor a cache that holds them.
        """
        plan = cast(SdpaMetadata, metadata)
        if kv_cache is None:
            if key is None or self.spec.attn_type.cached:
                raise AttentionInputError(f"{self.spec.attn_type} attention without a KV cache, or without keys")
        elif key is not None and value is not None:
            store_rows(key, value, kv_cache, plan.store, self.kv_scales, plan.may_skip)
        fp8 = self.spec.fp8_cache
        scale = self.spec.scale * self.kv_scales.k if fp8 else self.spec.scale
        kernel = self._written_out(plan, scale) if plan.scored else self._kernel(plan, scale)
        finish: Finish | None = partial(self._finish, fp8) if fp8 or self.sinks is not None else None
        return run(plan, query, Keys(key, value, kv_cache, plan.common), kernel, finish, output)

    def _kernel(self, plan: SdpaMetadata, scale: float) -> Kernel:
        return DotProduct(scale)

    def _written_out(self, plan: SdpaMetadata, scale: float) -> Kernel:
        spec = self.spec
        by_rule = Scores(scale, spec.causal, spec.sliding_window, spec.logits_soft_cap, plan.alibi_slopes)
        by_mask = Scores(scale, False, None, spec.logits_soft_cap, plan.alibi_slopes)
        return WrittenOut(by_rule, by_mask)

    def _finish(self, fp8: bool, attended: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
        if self.sinks is not None:
            assert lse is not None
            attended, _ = apply_sinks(attended, lse, self.sinks)
        return attended * self.kv_scales.v if fp8 else attended


class SdpaBuilder(AttentionMetadataBuilder):
    """Plans batches for `TorchSdpaImpl`: every decoding sequence on its own."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes, device=device)

    def build(self, common: CommonAttentionMetadata) -> SdpaMetadata:
        """See `AttentionMetadataBuilder.build`.

        Raises:
            AttentionInputError: a mask that contradicts the layer.
        """
        check_batch(self.spec, common)
        scored = needs_scores(self.spec, common) or self._sinks_are_scored
        return Planner(self.spec, common, self.block_size, self._limits(), scored).plan(self._slopes)

    @property
    def _sinks_are_scored(self) -> bool:
        """Whether attention sinks need written-out scores: the public operator gives no denominators."""
        return self.spec.has_sinks

    def _limits(self) -> Limits:
        return Limits(group=0, piece=None)


class TorchSdpaBackend(AttentionBackend):
    """Runs on any CPU and any NVIDIA GPU, in any floating dtype that PyTorch's attention knows."""

    name = "TORCH_SDPA"
    impl_class = TorchSdpaImpl
    metadata_class = SdpaMetadata
    builder_class = SdpaBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CPU, ran_on=(X86,)), DeviceSupport(DeviceKind.CUDA, ran_on=(HOPPER,))),
        dtypes=FLOATS,
        features=frozenset(Feature) - {Feature.CASCADE},
        refused={Feature.CASCADE: "attends to every sequence on its own, shared prefix or not"},
        attention_types=tuple(AttentionType),
    )
