"""The memory of one cache group, and whether a tensor is what its layout says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_transfer.errors import LayoutMismatchError, PeerError
from kv_transfer.layout import GroupLayout, KVLayout


@dataclass(frozen=True)
class Region:
    """The memory in which a worker keeps a cache group: `num_layers` times `num_blocks` blocks without gaps.

    Attributes:
        address: of its first byte in its process.
        num_layers: layers of the group.
        num_blocks: blocks of each layer.
        block_bytes: of one block in one layer.
    """

    address: int
    num_layers: int
    num_blocks: int
    block_bytes: int


def check_blocks(blocks: Sequence[int], num_blocks: int, whose: str) -> None:
    """Refuse blocks that a region does not have: in memory they would be those of its next layer.

    Raises:
        PeerError: names the block, and how many there are.
    """
    if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
        wrong = next(block for block in blocks if not 0 <= block < num_blocks)
        raise PeerError(f"block {wrong} of {whose} was asked for, it has {num_blocks}")


def regions_of(kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> tuple[Region, ...]:
    """The regions of these tensors, one a cache group, each (num_layers, num_blocks, *block).

    Raises:
        LayoutMismatchError: a tensor is not what its group's layout says; the text has both numbers.
    """
    if len(kv_caches) != len(layout.groups):
        raise LayoutMismatchError(f"{len(kv_caches)} tensors for {len(layout.groups)} cache groups")
    if len({kv_cache.device for kv_cache in kv_caches}) > 1:
        raise LayoutMismatchError(f"cache groups on several devices: {[str(cache.device) for cache in kv_caches]}")
    for index, (kv_cache, group) in enumerate(zip(kv_caches, layout.groups, strict=True)):
        if reason := _mismatch(kv_cache, group):
            raise LayoutMismatchError(f"cache group {index} ({group.kind}): {reason}")
    return tuple(
        Region(kv_cache.data_ptr(), group.num_layers, kv_cache.shape[1], group.block_bytes)
        for kv_cache, group in zip(kv_caches, layout.groups, strict=True)
    )


def _mismatch(kv_cache: torch.Tensor, group: GroupLayout) -> str | None:
    shape = tuple(kv_cache.shape)
    dtype = str(kv_cache.dtype).removeprefix("torch.")
    if len(shape) < 3 or shape[1] < 1:
        return f"the tensor's shape is {shape}, it must be (layers, blocks, *block) with at least one block"
    if shape[0] != group.num_layers:
        return f"the tensor has {shape[0]} layers, its layout {group.num_layers}"
    block_bytes = kv_cache[0, 0].nbytes
    if block_bytes != group.block_bytes:
        return f"a block of the tensor has {block_bytes} bytes, one of its layout {group.block_bytes}"
    if dtype != group.dtype:
        return f"the tensor's dtype is {dtype}, its layout's {group.dtype}"
    if shape[2:] != group.block_shape:
        return f"a block of the tensor is {shape[2:]}, one of its layout {group.block_shape} ({group.order})"
    if not kv_cache.is_contiguous():
        gapless = torch.empty(shape, device="meta").stride()
        return f"the tensor's strides are {kv_cache.stride()}, without gaps they are {gapless}"
    return None
