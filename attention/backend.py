"""The interface that every attention backend implements.

Symbols: B sequences, T query tokens of all of them, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """One batch, described once for all layers. Queries are packed: no padding anywhere.

    A sequence of `seq_lens[i]` tokens brings its last `cu_seqlens_q[i + 1] - cu_seqlens_q[i]` tokens as queries; the
    earlier ones are in the cache already (an earlier chunk, or the prompt when decoding).

    Attributes:
        cu_seqlens_q: (B + 1,) int32, where each sequence's queries begin in T.
        seq_lens: (B,) int32, keys of each sequence, this batch's tokens included.
        block_tables: (B, max_blocks) int32, the blocks of each sequence in order; padded with 0.
        slot_mapping: (T,) int64, `block * block_size + offset` where each token's key and value are stored.
        query_lens: the lengths behind `cu_seqlens_q`, as Python ints.
        context_lens: `seq_lens` as Python ints.
    """

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def decode_only(self) -> bool:
        """Whether every sequence brings exactly one token."""
        return all(n == 1 for n in self.query_lens)


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer asks of its backend.

    Attributes:
        num_heads: Hq.
        num_kv_heads: Hkv; divides Hq.
        head_size: D.
        scale: multiplies q·k, usually D**-0.5.
        sliding_window: a query sees itself and this many minus one tokens before it; None sees all.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None


class AttentionImpl(ABC):
    """One layer's attention."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        plan: object,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values in the cache, then attend, causally, over the whole sequences.

        Args:
            query: (T, Hq, D).
            key: (T, Hkv, D).
            value: (T, Hkv, D).
            kv_cache: this layer's cache, of `AttentionBackend.get_kv_cache_shape`.
            metadata: the batch.
            plan: what `AttentionBackend.plan` made of it.
            output: (T, Hq, D), written and returned when given.

        Returns:
            (T, Hq, D), of the query's dtype.
        """


class AttentionBackend(ABC):
    """A way to compute attention over a paged KV cache. Stateless: layers hold `AttentionImpl`s."""

    name: str
    """The name that selects it, upper case, as in vLLM."""
    impl_class: type[AttentionImpl]

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """One layer's cache: a block is contiguous, its keys before its values."""
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @classmethod
    @abstractmethod
    def refuse(cls, device: torch.device, dtype: torch.dtype, spec: AttentionSpec, block_size: int) -> list[str]:
        """Why this backend cannot run that; empty when it can."""

    @classmethod
    def plan(cls, spec: AttentionSpec, metadata: AttentionMetadata, block_size: int) -> object:
        """Prepare once per batch and attention kind what every layer's `forward` shares."""
        return None
