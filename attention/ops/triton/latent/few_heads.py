"""Decode of latent attention on Hopper GPUs by a kernel of its own, where the model or the rank has few heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from attention.ops.triton.launch import DeviceTraits, compiles_gluon, copies_rows
from attention.ops.triton.tuning import Tile

MOST_HEADS = 16
_TILES: Mapping[int, Tile] = MappingProxyType(
    {
        2: Tile(rows=MOST_HEADS, keys=32, num_warps=4, num_stages=3),
        1: Tile(rows=MOST_HEADS, keys=64, num_warps=4, num_stages=2),
    }
)
"""The kernel's, by the bytes of a number of the cache: heads of a program, and latents of a step."""
MOST_SPLITS = 32
"""Of a sequence: more take longer to be put together than they save."""
_RANK, _ROTARY = 512, 64
_FEWEST_TOKENS = 32
"""Of a block."""
_PROGRAMS = 2
"""Of a multiprocessor: what its registers hold, and its shared memory."""


def tile_of(cache: torch.Tensor) -> Tile:
    """The kernel's tile for a cache (num_blocks, block_size, R + P); a step's latents lie in one block."""
    tile = _TILES[cache.element_size()]
    return replace(tile, keys=min(tile.keys, cache.shape[1]))


def serves(query: torch.Tensor, rotary_query: torch.Tensor, cache: torch.Tensor, traits: DeviceTraits) -> bool:
    """Whether the kernel computes this: up to 16 heads over latents of 512 + 64 in blocks of multiples of 32.

    Args:
        query: (B, Hq, R).
        rotary_query: (B, Hq, P).
        cache: (num_blocks, block_size, R + P), of the query's dtype or float8_e4m3fn.
        traits: the device.
    """
    dtypes = (query.dtype, torch.float8_e4m3fn)
    return (
        compiles_gluon(traits)
        and query.dtype in (torch.bfloat16, torch.float16)
        and cache.dtype in dtypes
        and (query.shape[2], rotary_query.shape[2]) == (_RANK, _ROTARY)
        and query.shape[1] <= MOST_HEADS
        and cache.shape[1] % _FEWEST_TOKENS == 0
        and copies_rows(cache)
        and all(_is_in_pairs(queries) for queries in (query, rotary_query))
    )


def places(traits: DeviceTraits) -> int:
    """How many of the kernel's programs a device holds at once."""
    return _PROGRAMS * traits.num_sms


def fewest_keys(batch: int, cache_itemsize: int, traits: DeviceTraits) -> int:
    """Keys that are worth a split: what a program costs before its first tile, and the fewer sequences, the less.

    Args:
        batch: sequences.
        cache_itemsize: bytes of a number of the cache.
        traits: the device.
    """
    return 64 if cache_itemsize == 2 and 8 * batch <= traits.num_sms else 128


def _is_in_pairs(queries: torch.Tensor) -> bool:
    """Whether two neighbours can be read at once."""
    return queries.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in queries.stride()[:2])
