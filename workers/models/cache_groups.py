"""Which layers of a model keep the same form of keys and values, and so share memory, block tables and blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention.backend import AttentionBackend
from attention.cache_layout import layout_of
from attention.kv_cache import KVCacheSpec
from attention.spec import AttentionSpec


def cache_groups(
    layers: Sequence[tuple[AttentionSpec, type[AttentionBackend]]], block_size: int, dtype: torch.dtype
) -> tuple[KVCacheSpec, ...]:
    """The cache groups of these layers, that of the lowest layer first.

    Layers are of one group if they keep tokens in the same form (heads and their size, or a latent), see them for as
    long (all, or a window) and have backends that lay a block out alike.

    Args:
        layers: what each asks for, and how it attends.
        block_size: tokens in a block.
        dtype: of what is kept.

    Raises:
        AttentionBackendError: see `layout_of`.
    """
    members: dict[object, list[int]] = {}
    for i, (spec, backend) in enumerate(layers):
        layout = layout_of(backend, block_size, spec.num_kv_heads, spec.head_size)
        form = (spec.num_kv_heads, spec.head_size, spec.sliding_window, spec.mla is not None, layout)
        members.setdefault(form, []).append(i)
    return tuple(_group(indices, *layers[indices[0]], block_size, dtype) for indices in members.values())


def _group(
    layers: Sequence[int], spec: AttentionSpec, backend: type[AttentionBackend], block_size: int, dtype: torch.dtype
) -> KVCacheSpec:
    window = spec.sliding_window
    return KVCacheSpec(
        tuple(layers),
        spec.num_kv_heads,
        spec.head_size,
        block_size,
        dtype,
        kind="mla" if spec.mla is not None else "full" if window is None else "sliding",
        window=window,
        backend=backend,
    )
