"""What is asked of attention: by a layer (`AttentionSpec`) and by a whole worker (`AttentionNeeds`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

FP8 = torch.float8_e4m3fn
"""The dtype of an FP8 KV cache."""


class AttentionType(StrEnum):
    """Which tokens attend to which."""

    DECODER = "decoder"
    """Each token to itself and those before it, through the paged KV cache."""
    ENCODER = "encoder"
    """All tokens of a sequence to all; the encoder half of an encoder-decoder model. Nothing is cached."""
    ENCODER_ONLY = "encoder_only"
    """The same in a model that only encodes (embeddings, rerankers)."""
    ENCODER_DECODER = "encoder_decoder"
    """Cross attention: decoder tokens to all tokens of the encoder, whose keys and values are in the cache."""

    @property
    def cached(self) -> bool:
        """Whether keys and values live in the paged KV cache."""
        return self in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)


class Feature(StrEnum):
    """What not every backend can do. The value is how tables call it."""

    GQA = "GQA/MQA"
    PREFIX = "prefix, chunked prefill"
    NON_CAUSAL = "non-causal"
    SLIDING_WINDOW = "sliding window"
    ALIBI = "ALiBi"
    SOFT_CAP = "soft cap"
    SINKS = "sinks"
    FP8_KV = "FP8 KV"
    TREE_MASK = "tree mask"
    CUSTOM_MASK = "custom mask"
    CASCADE = "cascade"


class Phase(StrEnum):
    """What a worker's batches look like."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one latent and one rotary key for all heads.

    Attributes:
        kv_lora_rank: size of the latent, from which keys and values of every head are expanded.
        qk_nope_head_dim: size of a head's query and key without rotary embedding.
        qk_rope_head_dim: size of the rotary part, which all heads share in the key.
        v_head_dim: size of a head's value.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent_size(self) -> int:
        """What the cache keeps of a token: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer asks of its backend. The score of query i and key j, before the softmax, is

    s = scale * q_i·k_j;  with a soft cap c: s = c * tanh(s / c);  with ALiBi: s -= slope * |i - j|.

    Attributes:
        num_heads: Hq.
        num_kv_heads: Hkv; divides Hq. 1 with MLA.
        head_size: D. The latent size with MLA.
        scale: multiplies q·k, usually D**-0.5.
        sliding_window: a query sees itself and this many minus one tokens before it (and after it, where attention is
            not causal); None sees all.
        attn_type: which tokens attend to which.
        logits_soft_cap: c above; None has none (Gemma 2, arXiv:2408.00118).
        alibi_slopes: a slope for each query head; None has no such bias (arXiv:2108.12409).
        has_sinks: whether every query head has one learned logit more in its softmax, of a token without value
            (arXiv:2309.17453, as gpt-oss does).
        kv_cache_dtype: what keys and values are stored as; None: as they come. `FP8` scales them. Without meaning where
            nothing is cached, so that a model can give all of its layers the same.
        mla: set for a layer of multi-head latent attention.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None
    attn_type: AttentionType = AttentionType.DECODER
    logits_soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    has_sinks: bool = False
    kv_cache_dtype: torch.dtype | None = None
    mla: MLASpec | None = None

    @property
    def causal(self) -> bool:
        """Whether a query is kept from the keys behind it."""
        return self.attn_type is AttentionType.DECODER

    @property
    def fp8_cache(self) -> bool:
        """Whether keys and values are quantised: where nothing is cached, an encoder's never are."""
        return self.kv_cache_dtype == FP8 and self.attn_type.cached

    @property
    def features(self) -> frozenset[Feature]:
        """What this layer needs that not every backend can do."""
        asked = {
            Feature.GQA: self.num_heads != self.num_kv_heads,
            Feature.NON_CAUSAL: not self.causal,
            Feature.SLIDING_WINDOW: self.sliding_window is not None,
            Feature.ALIBI: self.alibi_slopes is not None,
            Feature.SOFT_CAP: self.logits_soft_cap is not None,
            Feature.SINKS: self.has_sinks,
            Feature.FP8_KV: self.fp8_cache,
        }
        return frozenset(feature for feature, needed in asked.items() if needed)

    def faults(self) -> list[str]:
        """What no backend could make sense of; empty when there is nothing."""
        found = []
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            found.append(f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key/value heads")
        if self.head_size < 1:
            found.append(f"a head size of {self.head_size} is not positive")
        if self.sliding_window is not None and self.sliding_window < 1:
            found.append(f"a sliding window holds at least 1 token, not {self.sliding_window}")
        if self.logits_soft_cap is not None and not self.logits_soft_cap > 0:
            found.append(f"a soft cap of {self.logits_soft_cap} is not positive")
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.num_heads:
            found.append(f"{len(self.alibi_slopes)} ALiBi slopes for {self.num_heads} query heads")
        if self.attn_type is AttentionType.ENCODER_DECODER and (self.sliding_window or self.alibi_slopes):
            found.append("cross attention has no distances between tokens: no sliding window, no ALiBi")
        return found


@dataclass(frozen=True)
class AttentionNeeds:
    """What a worker asks of the backend of one kind of layer.

    Attributes:
        spec: the layer.
        dtype: of queries, and of keys and values as they come.
        block_size: tokens in a KV block.
        phase: the batches that will come; None: any.
        features: what batches will bring beyond the layer's own: tree and custom masks, cascade, prefixes.
    """

    spec: AttentionSpec
    dtype: torch.dtype
    block_size: int
    phase: Phase | None = None
    features: frozenset[Feature] = frozenset()

    @property
    def all_features(self) -> frozenset[Feature]:
        """The layer's and the batches'."""
        return self.spec.features | self.features
