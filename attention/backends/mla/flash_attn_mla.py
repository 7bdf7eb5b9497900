"""FLASH_ATTN_MLA: FlashAttention 3 on Hopper (https://github.com/Dao-AILab/flash-attention). Row and interface only.

`flash_attn_varlen_func` and `flash_attn_with_kvcache` with the rotary part as queries and keys and the latent part as
`qv`, paged; prefill over expanded keys of 192 and values of 128.
"""

from __future__ import annotations

from attention.backends.mla.base import KernelToComeImpl, MLABackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind
from attention.spec import Feature


class FlashAttnMLAImpl(KernelToComeImpl):
    """Cannot be made yet."""

    backend = "FLASH_ATTN_MLA"


class FlashAttnMLABackend(MLABackend):
    """FlashAttention 3's latent attention on Hopper, prefill and decode."""

    name = "FLASH_ATTN_MLA"
    impl_class = FlashAttnMLAImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(
                DeviceKind.CUDA,
                low=(9, 0),
                high=(10, 0),
                any_of=("flash_attn_3", "vllm_flash_attn"),
                has_kernels=False,
            ),
        ),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(16, step=16),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "FlashAttention 3 has no FP8 for latent attention"},
        mla=True,
    )
