"""Which layers of a model keep the same form of keys and values, and so share memory, block tables and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attention.backend import AttentionBackend
from attention.cache_layout import layout_of
from attention.kv_cache import KVCacheSpec
from attention.spec import AttentionSpec
from workers.models.config.attention_config import AttentionConfig


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


def copies_of_groups(groups: Sequence[KVCacheSpec], attention: Sequence[AttentionConfig], size: int) -> tuple[int, ...]:
    """For each cache group how many of `size` ranks, neighbours of each other, keep the same in all of its layers.

    Args:
        groups: what one of the ranks keeps.
        attention: of each layer of the whole model.
        size: ranks.
    """
    return tuple(math.gcd(*(attention[layer].copies(size) for layer in group.layers)) for group in groups)


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
