"""CUTLASS_MLA: CUTLASS' decode kernel for Blackwell, as FlashInfer carries it. Row and interface only.

`BatchMLAPagedAttentionWrapper(backend="cutlass")`: SM 10.x, a latent of 512 + 64, at most 128 heads, blocks of 128.
"""

from __future__ import annotations

from attention.backends.mla.base import KernelToComeImpl, MLABackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind, Platform
from attention.spec import AttentionNeeds, Feature, Phase

MAX_HEADS = 128
"""Query heads of one tile of the kernel."""


class CutlassMLAImpl(KernelToComeImpl):
    """Cannot be made yet."""

    backend = "CUTLASS_MLA"


class CutlassMLABackend(MLABackend):
    """CUTLASS' latent attention on Blackwell, decode only."""

    name = "CUTLASS_MLA"
    impl_class = CutlassMLAImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(DeviceKind.CUDA, low=(10, 0), high=(11, 0), packages=("flashinfer",), has_kernels=False),
        ),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(only=(128,)),
        features=frozenset({Feature.GQA, Feature.PREFIX, Feature.FP8_KV}),
        phases=(Phase.DECODE,),
        mla=True,
    )

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """See `AttentionBackend.refuse_more`: the kernel's tile has 128 query heads."""
        heads = needs.spec.num_heads
        return [f"{heads} query heads, at most {MAX_HEADS}"] if heads > MAX_HEADS else []
