"""What the attention of one layer is, of a whole model or of one rank's share of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attention.spec import AttentionSpec, MLASpec
from workers.errors import ConfigError
from workers.ops.rope_config import RopeConfig


@dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention.

    Attributes:
        num_heads: Hq.
        num_kv_heads: Hkv; 1 with `mla`.
        head_size: D; the latent size with `mla`.
        scale: multiplies q·k.
        rope: how queries and keys are rotated; None: not at all.
        sliding_window: how many tokens a query sees, itself included; None: all.
        chunk_size: a query sees the tokens of its own chunk of so many, up to itself; None: there are no chunks.
        soft_cap: scores s become `soft_cap * tanh(s / soft_cap)`; None: they stay.
        has_sinks: whether every head has a learned logit more in its softmax.
        mla: set for multi-head latent attention.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rope: RopeConfig | None
    sliding_window: int | None = None
    chunk_size: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    mla: MLASpec | None = None

    def sharded(self, size: int) -> AttentionConfig:
        """What each of `size` ranks computes: its share of the heads.

        Where there are more ranks than key/value heads, neighbouring ranks have the same one; a latent is all ranks'.

        Raises:
            ConfigError: `size` does not divide the heads; names the value and the limit.
        """
        if self.num_heads % size:
            raise ConfigError(
                f"tensor parallelism of {size} does not divide the model's num_heads, which is {self.num_heads}"
            )
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"tensor parallelism of {size} neither divides the model's num_kv_heads nor is a multiple of it, "
                f"which is {self.num_kv_heads}"
            )
        return replace(self, num_heads=self.num_heads // size, num_kv_heads=max(1, self.num_kv_heads // size))

    def copies(self, size: int) -> int:
        """How many of `size` ranks, neighbours of each other, keep the same keys and values, or the same latents."""
        return max(1, size // self.num_kv_heads)

    def spec(self, kv_cache_dtype: torch.dtype | None = None) -> AttentionSpec:
        """What the layer asks of an attention backend; chunks are the layer's own business."""
        return AttentionSpec(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.scale,
            self.sliding_window,
            logits_soft_cap=self.soft_cap,
            has_sinks=self.has_sinks,
            kv_cache_dtype=kv_cache_dtype,
            mla=self.mla,
        )

    @property
    def projected_size(self) -> int:
        """Elements of a token's queries, keys and values, of all heads; with `mla`, of its queries and its latent."""
        if self.mla is None:
            return (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        return self.num_heads * (self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim) + self.mla.latent_size

    @property
    def attended_size(self) -> int:
        """Elements of a token's output, of all heads: what `o_proj` multiplies with."""
        return self.num_heads * (self.head_size if self.mla is None else self.mla.v_head_dim)
