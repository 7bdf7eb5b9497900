"""FLASHINFER_MLA: FlashInfer's latent attention (https://github.com/flashinfer-ai/flashinfer). Row and interface only.

`BatchMLAPagedAttentionWrapper` with backend fa2 (SM 8.0 on) and fa3 (SM 9.0), and on SM 10.x
`trtllm_batch_decode_with_kv_cache_mla`, which takes blocks of 32 or 64 and an FP8 cache.
"""

from __future__ import annotations

from attention.backends.mla.base import KernelToComeImpl, MLABackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, Feature

_BLACKWELL = (10, 0)
_BLACKWELL_BLOCKS = (32, 64)


class FlashInferMLAImpl(KernelToComeImpl):
    """Cannot be made yet."""

    backend = "FLASHINFER_MLA"


class FlashInferMLABackend(MLABackend):
    """FlashInfer's latent attention, prefill and decode."""

    name = "FLASHINFER_MLA"
    impl_class = FlashInferMLAImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(DeviceKind.CUDA, low=(8, 0), high=(11, 0), packages=("flashinfer",), has_kernels=False),
        ),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.FP8_KV}),
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """See `AttentionBackend.refuse_more`: FP8 and the block sizes of SM 10.x."""
        blackwell = platform.capability is not None and platform.capability >= _BLACKWELL
        reasons = []
        if Feature.FP8_KV in needs.spec.features and not blackwell:
            reasons.append("an FP8 cache of latents needs SM 10.0 or newer")
        if blackwell and needs.block_size not in _BLACKWELL_BLOCKS:
            reasons.append(f"block size {needs.block_size} is not one of: 32, 64 on SM 10.x")
        return reasons
