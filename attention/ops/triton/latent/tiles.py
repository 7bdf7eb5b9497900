"""How large the tiles of latent attention are, by dtype, heads and architecture."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attention.ops.triton.launch import DeviceTraits
from attention.ops.triton.tuning import MAX_SPLIT_KEYS, MAX_SPLITS, Splits, Tile, shrunk

# (bytes of an element of the queries, of the cache): tiles by how many heads are side by side. Measured on an H200
# (benchmarks/results/latent_tiles_h200.json).
_DECODE: Mapping[tuple[int, int], Mapping[int, Tile]] = MappingProxyType(
    {
        (2, 2): {16: Tile(16, 32, 4, 3), 32: Tile(32, 32, 4, 3), 64: Tile(64, 64, 8, 2)},
        (2, 1): {16: Tile(16, 32, 4, 3), 32: Tile(32, 32, 4, 3), 64: Tile(64, 32, 8, 2)},
    }
)
_DECODE_FP32 = {16: Tile(16, 16, 4, 1)}
_PREFILL = Tile(128, 64, 8, 3)
_PREFILL_FEW = Tile(64, 64, 4, 3)
_PREFILL_FP32 = Tile(32, 32, 8, 1)
_INTERPRETED = Tile(16, 16, 1, 1)
_ROWS_OF_HOPPER = 64
"""Of a matrix instruction of SM 9.0."""
_MOST_SPLITS_OF_MANY = 8
"""Splits of a sequence where the batch alone fills the device."""
_FULL = 0.9
"""The share of a device's places that is as good as all."""


def decode_tile(
    num_heads: int, latent_size: int, query_itemsize: int, cache_itemsize: int, traits: DeviceTraits
) -> Tile:
    """The decode kernel's tile: rows are heads.

    Args:
        num_heads: Hq.
        latent_size: of the latent and the rotary key, each padded to a power of two.
        query_itemsize: bytes of an element of the queries.
        cache_itemsize: bytes of an element of the cache.
        traits: the device.
    """
    if traits.arch == "interpreter":
        return _INTERPRETED
    tiles = _DECODE.get((query_itemsize, cache_itemsize), _DECODE_FP32)
    tile = tiles[max(rows for rows in tiles if rows <= max(num_heads, min(tiles)))]
    return shrunk(tile, lambda tile: _decode_bytes(tile, latent_size, query_itemsize), traits.shared_memory)


def prefill_tile(
    num_queries: int, num_groups: int, head_size: int, value_size: int, itemsize: int, traits: DeviceTraits
) -> Tile:
    """The prefill kernel's tile: rows are queries of one head.

    Args:
        num_queries: of the longest sequence.
        num_groups: sequences times heads.
        head_size: of queries and keys, their two parts each padded to a power of two.
        value_size: of values, likewise.
        itemsize: bytes of an element.
        traits: the device.
    """
    if traits.arch == "interpreter":
        return _INTERPRETED
    tile = _PREFILL if itemsize == 2 else _PREFILL_FP32
    if itemsize == 2 and (traits.arch != "sm90" or -(-num_queries // tile.rows) * num_groups < 2 * traits.num_sms):
        tile = _PREFILL_FEW

    def num_bytes(tile: Tile) -> int:
        return (tile.rows * head_size + tile.num_stages * tile.keys * (head_size + value_size)) * itemsize

    return shrunk(tile, num_bytes, traits.shared_memory)


def decode_places(tile: Tile, latent_size: int, itemsize: int, traits: DeviceTraits) -> int:
    """How many programs of the decode kernel a device holds at once; as of `decode_tile`, and the device."""
    return traits.num_sms * max(1, traits.shared_memory // _decode_bytes(tile, latent_size, itemsize))


def choose_splits(
    num_programs: int, max_seq_len: int, tile: Tile, places: int, min_tiles: int, most_splits: int
) -> Splits:
    """How sequences are dealt out so that few of the device's places stay empty; see `tuning.Splits`.

    Args:
        num_programs: sequences times tiles of heads.
        max_seq_len: tokens of the longest sequence.
        tile: of the kernel.
        places: programs that the device holds at once.
        min_tiles: tiles of keys that are worth a program.
        most_splits: of a sequence, where it is not too long for so few.
    """
    useful = max(1, -(-max_seq_len // (tile.keys * min_tiles)))
    wanted = min(places // num_programs, most_splits) if 2 * num_programs <= places else _even(num_programs, places)
    wanted = max(1, min(wanted, useful))
    count = max(wanted, min(-(-max_seq_len // MAX_SPLIT_KEYS), MAX_SPLITS))
    return Splits(count, wanted, MAX_SPLIT_KEYS // tile.keys)


def _even(num_programs: int, places: int) -> int:
    """The fewest splits after which the last round of programs is nearly full, or those that fill it best."""

    def used(splits: int) -> float:
        programs = num_programs * splits
        return programs / (places * -(-programs // places))

    every = range(1, _MOST_SPLITS_OF_MANY + 1)
    return next((splits for splits in every if used(splits) >= _FULL), max(every, key=used))


def _decode_bytes(tile: Tile, latent_size: int, itemsize: int) -> int:
    """Of shared memory: the stages of the pipeline, and queries and weights, which take turns.

    The instructions for 64 rows and more read keys from there while they run, so that they take a stage more.
    """
    stages = tile.num_stages if tile.rows >= _ROWS_OF_HOPPER else max(1, tile.num_stages - 1)
    return (tile.rows + stages * tile.keys) * latent_size * itemsize
