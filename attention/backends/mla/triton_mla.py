"""TRITON_MLA: latent attention in Triton, for CUDA and ROCm of any age. Row and interface only."""

from __future__ import annotations

from attention.backends.mla.base import KernelToComeImpl, MLABackend
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind
from attention.spec import Feature


class TritonMLAImpl(KernelToComeImpl):
    """Cannot be made yet."""

    backend = "TRITON_MLA"


class TritonMLABackend(MLABackend):
    """Latent attention in Triton, prefill and decode."""

    name = "TRITON_MLA"
    impl_class = TritonMLAImpl
    capabilities = Capabilities(
        devices=(
            DeviceSupport(DeviceKind.CUDA, low=(7, 5), packages=("triton",), has_kernels=False),
            DeviceSupport(DeviceKind.ROCM, packages=("triton",), has_kernels=False),
        ),
        dtypes=HALVES,
        block_sizes=Sizes(16, step=16),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        mla=True,
    )
