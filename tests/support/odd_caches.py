"""Backends whose KV cache is not the usual one: what they compute is CPU_ATTN's."""

from __future__ import annotations

import torch

from attention.backend import AttentionMetadata
from attention.backends.torch_sdpa.cpu_attn import CpuAttnBackend, CpuAttnImpl
from attention.platform import Platform
from attention.selection.registry import BACKENDS
from attention.spec import AttentionNeeds


class HeadsFirstImpl(CpuAttnImpl):
    """Over a cache of another shape, rearranged before and after."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert kv_cache is not None
        view = kv_cache.transpose(2, 3)
        usual = view.contiguous()
        attended = super().forward(query, key, value, usual, metadata, output)
        view.copy_(usual)
        return attended


class HeadsFirstBackend(CpuAttnBackend):
    """(num_blocks, 2, Hkv, block_size, D)."""

    name = "HEADS_FIRST"
    impl_class = HeadsFirstImpl

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        return (num_blocks, 2, num_kv_heads, block_size, head_size)


class HeadsOutsideImpl(CpuAttnImpl):
    """Over a cache of the usual shape and another order in memory."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        metadata: AttentionMetadata,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert kv_cache is not None
        assert not kv_cache.is_contiguous()
        usual = kv_cache.contiguous()
        attended = super().forward(query, key, value, usual, metadata, output)
        kv_cache.copy_(usual)
        return attended


class HeadsOutsideBackend(CpuAttnBackend):
    """The usual shape; in memory the heads are outside of the slots."""

    name = "HEADS_OUTSIDE"
    impl_class = HeadsOutsideImpl

    @staticmethod
    def get_kv_cache_stride_order() -> tuple[int, ...]:
        return (0, 1, 3, 2, 4)


class FullOnlyBackend(HeadsFirstBackend):
    """Refuses windows."""

    name = "FULL_ONLY"

    @classmethod
    def refuse_more(cls, platform: Platform, needs: AttentionNeeds) -> list[str]:
        return ["no windows"] if needs.spec.sliding_window is not None else []


ODD = {
    "HEADS_FIRST": "odd_caches:HeadsFirstBackend",
    "HEADS_OUTSIDE": "odd_caches:HeadsOutsideBackend",
    "FULL_ONLY": "odd_caches:FullOnlyBackend",
}
REGISTRY = {**BACKENDS, **ODD}
"""The real ones and these."""
