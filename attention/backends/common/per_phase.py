"""Two backends for one model: one for its decode steps, the other for all batches that bring more.

A worker that computes prompts between its decode steps has the best backend for each. Each half has its own builder,
so that a prompt's plan never touches what a captured decode step reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attention.cache_layout import CacheLayout, layout_of
from attention.errors import AttentionBackendError
from attention.metadata import CommonAttentionMetadata
from attention.platform import Platform
from attention.spec import AttentionNeeds, AttentionSpec, Phase

Halves = Mapping[Phase, type[AttentionBackend]]


def phase_of(common: CommonAttentionMetadata) -> Phase:
    """Decode where every sequence brings one token, else prefill."""
    return Phase.DECODE if common.decode_only else Phase.PREFILL


@dataclass(frozen=True)
class PhaseMetadata(AttentionMetadata):
    """A batch that one of the two backends has planned.

    Attributes:
        planned: by the backend of its phase.
    """

    planned: AttentionMetadata


class PhaseBuilder(AttentionMetadataBuilder):
    """Plans a batch with the backend of its phase."""

    halves: ClassVar[Halves]

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        super().__init__(spec, dtype, block_size, device)
        self._builders = {
            phase: half.builder_class(spec, dtype, block_size, device) for phase, half in self.halves.items()
        }
        self.graph_safe_prefill = self._builders[Phase.PREFILL].graph_safe_prefill
        self.graph_safe_decode = self._builders[Phase.DECODE].graph_safe_decode

    def build(self, common: CommonAttentionMetadata) -> PhaseMetadata:
        """See `AttentionMetadataBuilder.build`."""
        return PhaseMetadata(common, self._builders[phase_of(common)].build(common))


class PhaseImpl(AttentionImpl):
    """One layer's attention, in two ways.

    Args:
        spec: the layer.
        weight: what the implementations of its kind of layer take beside it: sinks, or `kv_b_proj` of latent attention.
    """

    halves: ClassVar[Halves]

    def __init__(self, spec: AttentionSpec, weight: torch.Tensor | None = None) -> None:
        super().__init__(spec, None if spec.mla is not None else weight)
        self._impls = {phase: half.impl_class(spec, weight) for phase, half in self.halves.items()}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`."""
        assert isinstance(metadata, PhaseMetadata)
        impl = self._impls[phase_of(metadata.common)]
        impl.kv_scales = self.kv_scales
        return impl.forward(query, key, value, kv_cache, metadata.planned, output)


class PhaseBackend(AttentionBackend):
    """The two as one."""

    halves: ClassVar[Halves]
    metadata_class = PhaseMetadata

    @classmethod
    def refuse(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Why the backend of that phase, or either of the two, cannot run that there."""
        asked = [half for phase, half in cls.halves.items() if needs.phase in (phase, None)]
        return list(dict.fromkeys(reason for half in asked for reason in half.refuse(platform, needs)))

    @classmethod
    def accepts_stored_keys(cls) -> bool:
        """Whether both do."""
        return all(half.accepts_stored_keys() for half in cls.halves.values())


def backend_by_phase(
    prefill: type[AttentionBackend], decode: type[AttentionBackend], needs: Sequence[AttentionNeeds]
) -> type[AttentionBackend]:
    """A backend that runs each batch as the backend of its phase does.

    Args:
        prefill: for batches that bring more than a token of some sequence.
        decode: for all others.
        needs: of every kind of layer that the model has.

    Raises:
        AttentionBackendError: the two lay a KV cache out in different ways.
    """
    for kind in needs:
        one, other = _layout(prefill, kind), _layout(decode, kind)
        if one != other:
            raise AttentionBackendError(
                f"{prefill.name} for prefill and {decode.name} for decode cannot share a KV cache: a block of a layer "
                f"is {one} for one and {other} for the other"
            )
    return _both(prefill, decode)


def _layout(backend: type[AttentionBackend], kind: AttentionNeeds) -> CacheLayout:
    return layout_of(backend, kind.block_size, kind.spec.num_kv_heads, kind.spec.head_size)


@functools.cache
def _both(prefill: type[AttentionBackend], decode: type[AttentionBackend]) -> type[AttentionBackend]:
    both = {Phase.PREFILL: prefill, Phase.DECODE: decode}

    class Builder(PhaseBuilder):
        halves = both

    class Impl(PhaseImpl):
        halves = both

    class Backend(PhaseBackend):
        halves = both
        name = decode.name if decode is prefill else f"{decode.name}, prefill {prefill.name}"
        impl_class = Impl
        builder_class = Builder
        capabilities = decode.capabilities
        get_kv_cache_shape = staticmethod(decode.get_kv_cache_shape)
        get_kv_cache_stride_order = staticmethod(decode.get_kv_cache_stride_order)

    return Backend
