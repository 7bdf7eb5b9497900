"""One case of the conformance suite: a layer, a cache and a batch, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from attention.backend import KVScales
from attention.spec import FP8, AttentionNeeds, AttentionSpec, AttentionType, Feature, Phase

Lens = tuple[tuple[int, int], ...]
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Batch:
    """What a batch looks like.

    Attributes:
        name: in the case's id.
        lens: (query tokens, keys) of each sequence.
        phase: what a worker with such batches asks for; None: batches of any phase.
    """

    name: str
    lens: Lens
    phase: Phase | None


@dataclass(frozen=True)
class Case:
    """One combination. Fields are those of the layer, the cache and the batch.

    Attributes:
        batch: the sequences' lengths.
        dtype: of queries, keys and values.
        scale_factor: times D**-0.5 is the layer's scale.
        alibi: whether heads have the slopes of the paper.
        fp8: scales of an FP8 cache; None: the cache has the dtype of the keys.
        mask: what the batch brings.
        common_prefix: tokens that all sequences have in the same blocks.
        cascade: whether the backend must be able to attend to the common prefix once for all; else it is an offer.
        new_keys: "all": the batch brings its keys; "none": they are in the cache already; "some": every other
            sequence brings its own (cross attention).
    """

    batch: Batch
    dtype: torch.dtype
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    attn_type: AttentionType = AttentionType.DECODER
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    scale_factor: float = 1.0
    fp8: KVScales | None = None
    mask: Literal["tree", "custom"] | None = None
    common_prefix: int = 0
    cascade: bool = False
    new_keys: Literal["all", "some", "none"] = "all"

    @property
    def id(self) -> str:
        """All that tells it from the others, readable; also the seed of its inputs."""
        parts = [
            "" if self.attn_type is AttentionType.DECODER else str(self.attn_type),
            self.batch.name,
            _SHORT[self.dtype],
            f"h{self.num_heads}x{self.num_kv_heads}x{self.head_size}",
            f"b{self.block_size}" if self.attn_type.cached else "",
            f"window{self.window}" if self.window is not None else "",
            f"cap{self.soft_cap:g}" if self.soft_cap is not None else "",
            "alibi" if self.alibi else "",
            "sinks" if self.sinks else "",
            f"scale{self.scale_factor:g}" if self.scale_factor != 1.0 else "",
            f"fp8[{self.fp8.k:g},{self.fp8.v:g}]" if self.fp8 is not None else "",
            f"{self.mask}mask" if self.mask is not None else "",
            f"common{self.common_prefix}" if self.common_prefix else "",
            "cascade" if self.cascade else "",
            f"{self.new_keys}new" if self.new_keys != "all" else "",
        ]
        return "-".join(disconnect for disconnect in parts if disconnect)

    @property
    def lens(self) -> Lens:
        """(query tokens, keys) of each sequence."""
        return self.batch.lens

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return tuple(query for query, _ in self.lens)

    @property
    def key_lens(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return tuple(keys for _, keys in self.lens)

    @property
    def scales(self) -> KVScales:
        """Of the cache."""
        return self.fp8 or KVScales()

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        slopes = tuple(2.0 ** (-8.0 * (i + 1) / self.num_heads) for i in range(self.num_heads))
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            scale=self.scale_factor * self.head_size**-0.5,
            sliding_window=self.window,
            attn_type=self.attn_type,
            logits_soft_cap=self.soft_cap,
            alibi_slopes=slopes if self.alibi else None,
            has_sinks=self.sinks,
            kv_cache_dtype=FP8 if self.fp8 is not None else None,
        )

    @property
    def needs(self) -> AttentionNeeds:
        """What a worker that will have such batches asks for."""
        decoder = self.attn_type is AttentionType.DECODER
        asked = {
            Feature.PREFIX: decoder and any(1 < query < keys for query, keys in self.lens),
            Feature.TREE_MASK: self.mask == "tree",
            Feature.CUSTOM_MASK: self.mask == "custom",
            Feature.CASCADE: self.cascade,
        }
        features = frozenset(feature for feature, needed in asked.items() if needed)
        return AttentionNeeds(self.spec, self.dtype, self.block_size, self.batch.phase, features)
