"""The interface that every attention backend implements.

A backend is used in FlashInfer's two verbs: its builder plans a batch once (`AttentionMetadataBuilder.build`), and
every layer's implementation runs with that plan (`AttentionImpl.forward`).

Symbols: B sequences, T query tokens of all of them, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from attention.broken import import_fault
from attention.capability import Capabilities, DeviceSupport
from attention.errors import AttentionInputError
from attention.metadata import CommonAttentionMetadata
from attention.platform import PACKAGES, Platform
from attention.spec import AttentionNeeds, AttentionSpec, Feature


@dataclass(frozen=True)
class AttentionMetadata:
    """A batch as a backend wants it: what all layers of one kind share. Backends add fields in a subclass.

    Attributes:
        common: the batch.
    """

    common: CommonAttentionMetadata


class AttentionMetadataBuilder:
    """Plans batches for all layers of one kind. Made once per model, so it may keep workspaces.

    Args:
        spec: the layers.
        dtype: of queries.
        block_size: tokens in a KV block.
        device: where the batches are.
    """

    graph_safe_decode: bool = False
    """Whether what `build` makes of a batch of one token each, and the layers' run with it, can be captured in a CUDA
    graph and replayed: it depends on the contents of the batch's tensors, and on `context_lens` only as limits."""

    graph_safe_prefill: bool = False
    """Whether the layers' run with what `build` makes of a `lasting` batch of whole sequences can be captured and
    replayed: a second call of `build` with the same batch launches nothing, and whatever the run reads beside the
    batch's tensors and the layers' own is kept by the builder. Not with an FP8 cache, which prompts attend to by way of
    block tables that a plan may have copied."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.block_size = block_size
        self.device = device

    def build(self, common: CommonAttentionMetadata) -> AttentionMetadata:
        """Prepare one batch.

        Raises:
            AttentionInputError: the batch brings what the layers or the backend cannot do (a mask, say).
        """
        return AttentionMetadata(common)


@dataclass(frozen=True)
class KVScales:
    """What an FP8 KV cache is multiplied by when it is read: stored = key / k, attended = stored * k.

    Attributes:
        k: of keys.
        v: of values.
    """

    k: float = 1.0
    v: float = 1.0


class AttentionImpl(ABC):
    """One layer's attention.

    Args:
        spec: the layer.
        sinks: (Hq,) float32, where `spec.has_sinks`.
    """

    def __init__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> None:
        if spec.has_sinks != (sinks is not None):
            raise AttentionInputError(f"has_sinks is {spec.has_sinks}, and sinks are {'not ' * (sinks is None)}given")
        if sinks is not None and sinks.shape != (spec.num_heads,):
            raise AttentionInputError(f"sinks of shape {tuple(sinks.shape)}, expected ({spec.num_heads},)")
        self.spec = spec
        self.sinks = sinks
        self.kv_scales = KVScales()
        """Of an FP8 cache; assigned when they are known, see `attention.fp8`."""

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values in the cache, then attend over the whole sequences.

        Queries, keys and values may be strided cuts of one projection; the last dimension is contiguous. With an FP8
        cache every key is seen as the cache holds it, also this batch's own, so that chunking changes nothing.

        Args:
            query: (T, Hq, D).
            key: (Tk, Hkv, D), Tk being T except in cross attention, where it is the encoder's tokens; None when all
                are in the cache already.
            value: (Tk, Hkv, D), or None with `key`.
            kv_cache: this layer's cache, of `AttentionBackend.get_kv_cache_shape`; None where nothing is cached
                (encoders).
            metadata: what the backend's builder made of the batch.
            output: (T, Hq, D), of the query's dtype, written and returned when given; may hold anything before.

        Returns:
            (T, Hq, D), of the query's dtype. A query that sees no key gives zeros.
        """


class AttentionBackend(ABC):
    """A way to compute attention over a paged KV cache. Stateless: models have builders, layers implementations."""

    name: ClassVar[str]
    """The name that selects it, upper case, as in vLLM."""
    impl_class: ClassVar[type[AttentionImpl]]
    metadata_class: ClassVar[type[AttentionMetadata]] = AttentionMetadata
    builder_class: ClassVar[type[AttentionMetadataBuilder]] = AttentionMetadataBuilder
    capabilities: ClassVar[Capabilities]

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """One layer's cache as the implementation indexes it, blocks first.

        Asked when memory is allocated; what is not of this shape must be stored by the backend itself.
        """
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...] | None:
        """The dimensions of that shape as they lie in memory, outermost first; None: as they are.

        Blocks come first here, too, so that each is one piece of memory, which is what travels to another worker.
        """
        return None

    @classmethod
    def accepts_stored_keys(cls) -> bool:
        """Whether a batch's keys and values may be in the cache already when a layer is given none, put there by
        another kernel just as `attention.kv_cache.reshape_and_cache` does, or `concat_and_cache_mla` latents.

        A backend that stores anything else, in a cache of the usual shape, says no.
        """
        usual: tuple[int, ...] = (3, 80, 176)
        if not cls.capabilities.mla:
            usual = AttentionBackend.get_kv_cache_shape(3, 80, 7, 176)
        shape = cls.get_kv_cache_shape(3, 80, 1 if cls.capabilities.mla else 7, 176)
        return shape == usual and cls.get_kv_cache_stride_order() in (None, tuple(range(len(usual))))

    @classmethod
    def refuse(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Why this backend cannot run that there; empty when it can."""
        return [*cls.capabilities.refuse(platform, needs), *cls.refuse_more(platform, needs)]

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        """Reasons that the table has no column for: combinations of what is accepted one by one."""
        return []

    @classmethod
    def faults(cls, platform: Platform) -> list[str]:
        """Why it cannot run there although it does not refuse: libraries that are installed and broken. Imports."""
        if platform.simulated:
            return []
        there = [each for each in cls.capabilities.devices if each.kind is platform.kind and not each.refuse(platform)]
        faults = [_broken_libraries(support, platform) for support in there]
        return min(faults, key=len, default=[])

    @classmethod
    def generation(cls, platform: Platform, needs: AttentionNeeds) -> int | None:
        """Which generation of its kernels would run that there, for a backend that takes them from several packages.

        None where it refuses, and of a backend whose kernels have no generations.
        """
        return None


def _broken_libraries(support: DeviceSupport, platform: Platform) -> list[str]:
    """Why what is installed of the libraries that an entry of the table asks for is of no use; empty when it is."""
    needed = {package: import_fault(package) for package in support.packages}
    choice = {package: import_fault(package) for package in support.any_of if package in platform.packages}
    if not all(choice.values()):
        choice = {}
    return [f"{PACKAGES[name][1]} is broken: {fault}" for name, fault in {**needed, **choice}.items() if fault]


def refuse_masks(common: CommonAttentionMetadata, supported: frozenset[Feature], backend: str) -> None:
    """Check at the start of a batch that its masks are among what the backend supports.

    Raises:
        AttentionInputError: a mask that it cannot apply.
    """
    for feature in common.features - supported:
        raise AttentionInputError(f"{backend} cannot run a batch with a {feature}")
