"""How a backend lays out a layer's KV cache: asked when memory is allocated, and compared by workers that share it."""

from __future__ import annotations

from dataclasses import dataclass

from attention.backend import AttentionBackend
from attention.errors import AttentionBackendError

_PROBE = {"block": 3, "kv": 2, "slot": 80, "head": 7, "element": 176}
"""Sizes that tell the dimensions of a shape apart."""


@dataclass(frozen=True)
class CacheLayout:
    """One layer's cache in memory; two of the same layout can share it, and copy blocks as they are.

    Attributes:
        block_shape: of one block, outermost dimension first. Blocks lie one behind the other.
        dims: what these dimensions are: kv, slot, head and element; a number where it is none of them.
        stride_order: the dimensions of `AttentionBackend.get_kv_cache_shape`, blocks among them, in this order.
    """

    block_shape: tuple[int, ...]
    dims: tuple[str, ...]
    stride_order: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.block_shape} ({', '.join(self.dims)})"


def layout_of(backend: type[AttentionBackend], block_size: int, num_kv_heads: int, head_size: int) -> CacheLayout:
    """What a backend says of its cache.

    Args:
        backend: whose.
        block_size: tokens in a block.
        num_kv_heads: Hkv.
        head_size: D, or the latent's size.

    Raises:
        AttentionBackendError: an order that does not fit the shape, or blocks that are not the outermost dimension of
            both: each must be one piece of memory to be handed to another worker.
    """
    shape = backend.get_kv_cache_shape(1, block_size, num_kv_heads, head_size)
    order = backend.get_kv_cache_stride_order() or tuple(range(len(shape)))
    names = _names(backend, one_head=num_kv_heads == 1)
    if sorted(order) != list(range(len(shape))) or len(names) != len(shape):
        raise AttentionBackendError(f"{_name(backend)} lays out a cache of shape {shape} in the order {order}")
    if names[0] != "block" or order[0] != 0:
        raise AttentionBackendError(
            f"{_name(backend)} lays out its KV cache as {', '.join(names[dim] for dim in order)} of the dimensions "
            f"{', '.join(names)}: blocks must come first in both"
        )
    inner = order[1:]
    return CacheLayout(tuple(shape[dim] for dim in inner), tuple(names[dim] for dim in inner), order)


def _names(backend: type[AttentionBackend], one_head: bool) -> tuple[str, ...]:
    sizes = {**_PROBE, "head": 1} if one_head else _PROBE
    probed = backend.get_kv_cache_shape(sizes["block"], sizes["slot"], sizes["head"], sizes["element"])
    known = {size: name for name, size in sizes.items()}
    return tuple(known.get(size, str(size)) for size in probed)


def _name(backend: type[AttentionBackend]) -> str:
    return getattr(backend, "name", backend.__name__)
