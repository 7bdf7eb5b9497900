"""FLASHMLA: DeepSeek's decode kernel for Hopper (https://github.com/deepseek-ai/FlashMLA). Row and interface only.

Its dense decode kernel, `flash_mla_with_kvcache` after `get_mla_metadata`, is made for SM 9.0 and a bf16 or fp16 cache
in blocks of 64; what the library has for SM 10.x and FP8 is sparse attention.
"""

from __future__ import annotations

from attention.backends.mla.base import KernelToComeImpl, MLABackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind
from attention.spec import Feature, Phase


class FlashMLAImpl(KernelToComeImpl):
    """Cannot be made yet."""

    backend = "FLASHMLA"


class FlashMLABackend(MLABackend):
    """DeepSeek's FlashMLA on Hopper, decode only."""

    name = "FLASHMLA"
    impl_class = FlashMLAImpl
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(9, 0), high=(10, 0), packages=("flash_mla",), has_kernels=False),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(only=(64,)),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "FlashMLA reads FP8 in its sparse kernels only"},
        phases=(Phase.DECODE,),
        mla=True,
    )
