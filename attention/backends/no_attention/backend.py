"""NO_ATTENTION: everything but attention, to debug and to profile the rest of a model."""

from __future__ import annotations

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata
from attention.capability import FLOATS, HOPPER, X86, Capabilities, DeviceSupport
from attention.kv_cache import reshape_and_cache
from attention.platform import DeviceKind
from attention.spec import AttentionType, Feature


class NoAttentionImpl(AttentionImpl):
    """Stores keys and values, so that the cache, its transfer and its hooks work, and gives zeros."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; the result is zero."""
        if kv_cache is not None and key is not None and value is not None:
            reshape_and_cache(key, value, kv_cache, metadata.common.slot_mapping, self.kv_scales)
        if output is None:
            return torch.zeros_like(query, memory_format=torch.contiguous_format)
        return output.zero_()


class NoAttentionBackend(AttentionBackend):
    """A model's time with this backend is its time without attention. What a model says with it is worthless.

    It is in no list of priorities: it must be named. It accepts every feature because it ignores all of them.
    """

    name = "NO_ATTENTION"
    impl_class = NoAttentionImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(DeviceKind.CPU, ran_on=(X86,)),
            DeviceSupport(DeviceKind.CUDA, ran_on=(HOPPER,)),
            *(DeviceSupport(kind) for kind in (DeviceKind.ROCM, DeviceKind.TPU, DeviceKind.XPU)),
        ),
        dtypes=FLOATS,
        features=frozenset(Feature),
        attention_types=tuple(AttentionType),
    )
