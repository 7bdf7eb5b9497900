"""CPU_ATTN: the default on a CPU. Sequences that decode attend together, in groups of similar length.

With small models a decode step is dominated by the cost of calling operators, so there are as few calls as the memory
of a gathered group allows; with long contexts a group shrinks to one sequence and the work is the same as TORCH_SDPA's.
"""

from __future__ import annotations

from attention.backend import AttentionMetadata, AttentionSpec
from attention.backends.sdpa_plan import SdpaPlan, make_plan
from attention.backends.torch_sdpa import TorchSdpaBackend

_GROUP_BYTES = 8 << 20
"""Keys and values gathered at a time, counted in float32: small enough to be read back from the processor's cache."""


class CpuAttnBackend(TorchSdpaBackend):
    """As `TorchSdpaBackend`, with decoding sequences batched."""

    name = "CPU_ATTN"

    @classmethod
    def plan(cls, spec: AttentionSpec, metadata: AttentionMetadata, block_size: int) -> SdpaPlan:
        """See `AttentionBackend.plan`: decoding sequences in groups."""
        bytes_per_token = 2 * spec.num_kv_heads * spec.head_size * 4
        return make_plan(spec, metadata, block_size, max_group_tokens=_GROUP_BYTES // bytes_per_token)
