"""How large the kernels' tiles are, by dtype, head size and architecture: measured on an H200, cut to fit elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from attention.errors import AttentionInputError
from attention.ops.triton.launch import DeviceTraits

MAX_SPLITS = 64
"""The most programs that share one sequence's keys in decode."""

MIN_TILES = 2
"""The fewest tiles of keys worth a split of its own."""

MAX_SPLIT_KEYS = 8192
"""The most keys that a split is given for being one of enough: else a batch would wait for its longest sequence."""

_PROGRAMS_PER_SM = 4
"""Programs that keep a multiprocessor busy: with fewer, smaller tiles or more splits pay."""


@dataclass(frozen=True)
class Tile:
    """One launch's shape.

    Attributes:
        rows: rows of queries times heads of a program (BLOCK_M).
        keys: keys of a step (BLOCK_N).
        num_warps: warps of a program.
        num_stages: depth of the software pipeline of loads.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """Tiles of the prefill kernel, by how much there is to do.

    Attributes:
        few: for at most `few.rows` rows a sequence.
        half: for more rows, where `full` would leave multiprocessors idle.
        full: for long prompts.
    """

    few: Tile
    half: Tile
    full: Tile


_PREFILL_FP32 = PrefillTiles(Tile(16, 32, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2))

# (bytes of an element of the queries, of the keys, head size padded to a power of two and at least 64)
_PREFILL: Mapping[tuple[int, int, int], PrefillTiles] = MappingProxyType(
    {
        (2, 2, 64): PrefillTiles(Tile(16, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        (2, 2, 128): PrefillTiles(Tile(16, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        (2, 2, 256): PrefillTiles(Tile(16, 32, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (2, 1, 64): PrefillTiles(Tile(16, 32, 4, 3), Tile(64, 128, 4, 2), Tile(128, 128, 8, 3)),
        (2, 1, 128): PrefillTiles(Tile(16, 32, 4, 3), Tile(64, 128, 4, 2), Tile(128, 128, 8, 3)),
        (2, 1, 256): PrefillTiles(Tile(16, 32, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    }
)
_MASKED_KEYS = 32  # of a step under a custom mask: its tile takes registers too

# (bytes of an element of the queries, of the keys, head size as above); rows follow the heads
_DECODE: Mapping[tuple[int, int, int], Tile] = MappingProxyType(
    {
        (2, 2, 64): Tile(16, 64, 4, 3),
        (2, 2, 128): Tile(16, 64, 4, 2),
        (2, 2, 256): Tile(16, 64, 4, 2),
        (2, 1, 64): Tile(16, 64, 2, 3),
        (2, 1, 128): Tile(16, 64, 2, 3),
        (2, 1, 256): Tile(16, 64, 4, 3),
    }
)
_DECODE_FP32 = Tile(16, 32, 4, 2)
_INTERPRETED = Tile(16, 16, 1, 1)


def fit(tile: Tile, head_size: int, itemsize: int, traits: DeviceTraits) -> Tile:
    """Shrink a tile until keys and values of its stages, with the queries, fit the shared memory."""

    def num_bytes(tile: Tile) -> int:
        return (tile.rows + 2 * tile.num_stages * tile.keys) * head_size * itemsize

    return shrunk(tile, num_bytes, traits.shared_memory, kept_stages=2)


def shrunk(tile: Tile, num_bytes: Callable[[Tile], int], limit: int, kept_stages: int = 1) -> Tile:
    """The tile with fewer stages, then keys, then rows, until it takes no more than the limit or is the smallest.

    Args:
        tile: to begin with.
        num_bytes: of shared memory that one takes.
        limit: of that.
        kept_stages: so many are given up only where keys cannot be fewer.
    """
    while num_bytes(tile) > limit:
        if tile.num_stages > kept_stages or (tile.num_stages > 1 and tile.keys == 16):
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.keys > 16:
            tile = replace(tile, keys=tile.keys // 2)
        elif tile.rows > 16:
            tile = replace(tile, rows=tile.rows // 2)
        else:
            break
    return tile


def prefill_tile(
    num_rows: int,
    num_groups: int,
    head_size: int,
    query_itemsize: int,
    key_itemsize: int,
    custom_mask: bool,
    traits: DeviceTraits,
) -> Tile:
    """The prefill kernel's tile.

    Args:
        num_rows: rows that the longest sequence fills, queries times heads of one KV head.
        num_groups: sequences times KV heads.
        head_size: D, padded to a power of two.
        query_itemsize: bytes of an element of the queries.
        key_itemsize: bytes of an element of the keys.
        custom_mask: whether a mask says what is seen.
        traits: the device.
    """
    if traits.arch == "interpreter":
        return _INTERPRETED
    tiles = _PREFILL.get((query_itemsize, key_itemsize, max(64, head_size)), _PREFILL_FP32)
    if num_rows <= tiles.few.rows:
        tile = tiles.few
    elif -(-num_rows // tiles.full.rows) * num_groups < _PROGRAMS_PER_SM * traits.num_sms:
        tile = tiles.half
    else:
        tile = tiles.full
    if custom_mask:
        tile = replace(tile, keys=min(tile.keys, _MASKED_KEYS))
    elif traits.arch != "sm90":  # without Hopper's matrix instructions larger steps spill registers
        tile = replace(tile, keys=min(tile.keys, 64))
    return fit(tile, head_size, query_itemsize, traits)


def decode_tile(group: int, head_size: int, query_itemsize: int, key_itemsize: int, traits: DeviceTraits) -> Tile:
    """The decode kernel's tile.

    Args:
        group: query heads of one KV head, padded to a power of two.
        head_size: D, padded to a power of two.
        query_itemsize: bytes of an element of the queries.
        key_itemsize: bytes of an element of the keys.
        traits: the device.
    """
    interpreted = traits.arch == "interpreter"
    tile = _DECODE.get((query_itemsize, key_itemsize, max(64, head_size)), _DECODE_FP32)
    tile = replace(_INTERPRETED if interpreted else tile, rows=min(max(group, 16), 64))
    return fit(tile, head_size, query_itemsize, traits)


@dataclass(frozen=True)
class Splits:
    """How decode deals the keys of a sequence out to programs.

    A sequence is cut into `wanted` splits, or more where those would be longer than `most_tiles`, or fewer where they
    would be shorter than `MIN_TILES`; never into more than `count`.

    Attributes:
        count: programs launched for each sequence.
        wanted: splits that fill the device.
        most_tiles: tiles of keys of the longest split.
    """

    count: int
    wanted: int
    most_tiles: int


def given_splits(num_splits: int) -> Splits:
    """As many as are asked for, however long they are."""
    return Splits(num_splits, num_splits, 1 << 30)


def check_splits(num_splits: int | None) -> None:
    """Refuse a number of splits that is asked for and cannot be had.

    Raises:
        AttentionInputError: with the value and the limits.
    """
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise AttentionInputError(f"num_splits {num_splits} is not between 1 and {MAX_SPLITS}")


def choose_splits(num_programs: int, max_seq_len: int, tile: Tile, traits: DeviceTraits) -> Splits:
    """Splits that fill the device and bound the wait for the longest sequence, from numbers that the host knows.

    Args:
        num_programs: programs of an unsplit launch.
        max_seq_len: keys of the longest sequence.
        tile: of `decode_tile`.
        traits: the device.
    """
    useful = -(-max_seq_len // (tile.keys * MIN_TILES))
    wanted = max(1, min(_PROGRAMS_PER_SM * traits.num_sms // num_programs, useful, MAX_SPLITS))
    count = max(wanted, min(-(-max_seq_len // MAX_SPLIT_KEYS), MAX_SPLITS))
    return Splits(count, wanted, MAX_SPLIT_KEYS // tile.keys)
