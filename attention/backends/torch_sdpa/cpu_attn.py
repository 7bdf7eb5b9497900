"""CPU_ATTN: the default on a CPU. Few operators for short contexts, small pieces for long ones.

With small models a decode step is dominated by the cost of calling operators, so sequences of similar length attend
together, as many as a piece holds. A long context is gathered and attended to in pieces that stay in the processor's
cache, merged by log-sum-exp: fresh memory for a whole context costs several times the attention itself.
"""

from __future__ import annotations

import torch

from attention.backend import AttentionBackend
from attention.backends.torch_sdpa.backend import SdpaBuilder, TorchSdpaImpl
from attention.backends.torch_sdpa.kernels import DotProduct, Kernel, MergeableDotProduct
from attention.backends.torch_sdpa.plan import Limits, SdpaMetadata
from attention.backends.torch_sdpa.workspace import Workspace
from attention.capability import FLOATS, X86, Capabilities, DeviceSupport
from attention.platform import DeviceKind
from attention.spec import AttentionSpec, AttentionType, Feature

_PIECE_BYTES = 4 << 20
"""Keys and values gathered at a time; measured: smaller pieces pay for more operators, larger ones leave the cache."""
_LEAST_TOKENS = 16


class CpuAttnImpl(TorchSdpaImpl):
    """As `TorchSdpaImpl`, through an operator that also gives the denominators wherever they are needed."""

    def _kernel(self, plan: SdpaMetadata, scale: float) -> Kernel:
        merges = self.sinks is not None or plan.merges
        return MergeableDotProduct(scale) if merges else DotProduct(scale)


class CpuAttnBuilder(SdpaBuilder):
    """Plans batches for `CpuAttnImpl`: decoding sequences in groups, long contexts in pieces, all in one workspace."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        tokens = max(_LEAST_TOKENS, _PIECE_BYTES // (2 * spec.num_kv_heads * spec.head_size * dtype.itemsize))
        self._at_once = Limits(group=tokens, piece=tokens, workspace=Workspace(spec, dtype, tokens))

    @property
    def _sinks_are_scored(self) -> bool:
        return False

    def _limits(self) -> Limits:
        return self._at_once


class CpuAttnBackend(AttentionBackend):
    """Runs on any CPU, in any floating dtype that PyTorch's attention knows."""

    name = "CPU_ATTN"
    impl_class = CpuAttnImpl
    metadata_class = SdpaMetadata
    builder_class = CpuAttnBuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CPU, ran_on=(X86,)),),
        dtypes=FLOATS,
        features=frozenset(Feature) - {Feature.CASCADE},
        refused={Feature.CASCADE: "sequences that share a prefix read it from the processor's cache as it is"},
        attention_types=tuple(AttentionType),
    )
