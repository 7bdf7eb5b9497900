"""The batches of the conformance suite: ragged lengths around block boundaries, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from attention.spec import Phase
from attention_cases import Batch

PREFILL = Batch("prefill", ((1, 1), (5, 5), (15, 15), (16, 16), (17, 17), (64, 64), (130, 130)), Phase.PREFILL)
CHUNK = Batch("chunk", ((3, 20), (16, 32), (33, 64), (2, 129), (47, 48), (1, 50), (15, 31)), Phase.PREFILL)
DECODE = Batch("decode", tuple((1, n) for n in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200)), Phase.DECODE)
MIXED = Batch("mixed", ((1, 33), (20, 20), (1, 150), (7, 40), (1, 1), (64, 128), (1, 64)), None)
SEQUENCES = Batch("sequences", ((1, 1), (5, 5), (16, 16), (17, 17), (64, 64), (130, 130)), Phase.PREFILL)
CROSS = Batch("cross", ((1, 7), (4, 20), (20, 7), (1, 64), (33, 65), (1, 1)), Phase.PREFILL)
CROSS_DECODE = Batch("cross_decode", ((1, 7), (1, 64), (1, 1), (1, 129)), Phase.DECODE)


@dataclass(frozen=True)
class Batches:
    """The batches of a kind of device.

    Attributes:
        core: what every feature meets.
        paired: what every pair of features meets.
        more: what is met without features.
        long: sequences of several tiles.
        trees: all sequences bring as many tokens as the tree has nodes.
        custom: for custom masks.
        shared: sequences that have their first `common_prefix` tokens in common: few and short, where reading them
            once for all is not worth it, and enough that it is.
        common_prefix: whole blocks of 16.
        encoder: whole sequences.
        cross: several queries for each sequence of an encoder, more than it has tokens and fewer.
        cross_decode: one query for each.
    """

    core: tuple[Batch, ...] = (PREFILL, CHUNK, DECODE, MIXED)
    paired: tuple[Batch, ...] = (PREFILL, CHUNK, DECODE, MIXED)
    more: tuple[Batch, ...] = (
        Batch("prompt", ((33, 33),), Phase.PREFILL),
        Batch("first_token", ((1, 1),), Phase.PREFILL),
        Batch("decode_one", ((1, 77),), Phase.DECODE),
        Batch("decode_even", ((1, 40),) * 4, Phase.DECODE),
        Batch("decode_many", tuple((1, 1 + 37 * i % 260) for i in range(70)), Phase.DECODE),
    )
    long: tuple[Batch, ...] = (
        Batch("tiles", ((600, 600),), Phase.PREFILL),
        Batch("tiles_chunk", ((300, 700), (1, 1)), Phase.PREFILL),
    )
    trees: tuple[Batch, ...] = (
        Batch("tree7", ((7, 7), (7, 20), (7, 23), (7, 100)), None),
        Batch("tree1", ((1, 1), (1, 17), (1, 64)), None),
        Batch("tree33", ((33, 33), (33, 49), (33, 161)), None),
    )
    custom: tuple[Batch, ...] = (
        Batch("custom_prefill", ((5, 5), (16, 16), (40, 40)), Phase.PREFILL),
        Batch("custom_chunk", ((5, 21), (1, 33), (40, 130)), None),
    )
    shared: tuple[Batch, ...] = (
        Batch("shared_few", ((1, 257), (33, 320), (1, 300)), None),
        Batch("shared_decode", tuple((1, n) for n in (257, 258, 272, 273, 288, 300, 320, 321, 400)), Phase.DECODE),
        Batch("shared_chunk", ((5, 262), (33, 289), (16, 280), *((2, 258 + 9 * i) for i in range(6))), Phase.PREFILL),
        Batch("shared_mixed", ((1, 257), (33, 300), (1, 280), (1, 384), *((1, 257 + 15 * i) for i in range(6))), None),
    )
    common_prefix: int = 256
    encoder: Batch = SEQUENCES
    cross: Batch = CROSS
    cross_decode: Batch = CROSS_DECODE


GPU_LONG = (
    Batch("long_prefill", ((1, 1), (2048, 2048), (1000, 1000), (129, 129)), Phase.PREFILL),
    Batch("long_chunk", ((512, 4608), (300, 8191), (1, 2049)), Phase.PREFILL),
    Batch("long_decode", ((1, 8192), (1, 1), (1, 4097), (1, 2047), (1, 16)), Phase.DECODE),
    Batch("long_decode_one", ((1, 6001),), Phase.DECODE),
    Batch("long_mixed", ((1, 4096), (700, 700), (1, 1), (65, 3000), (1, 513)), None),
)
_TINY_DECODE = Batch("tiny_decode", ((1, 1), (1, 16), (1, 33)), Phase.DECODE)
_TINY_MIXED = Batch("tiny_mixed", ((1, 17), (5, 5), (4, 20)), None)
TINY = Batches(
    core=(
        Batch("tiny_prefill", ((1, 1), (16, 16)), Phase.PREFILL),
        Batch("tiny_chunk", ((3, 20), (2, 33)), Phase.PREFILL),
        _TINY_DECODE,
    ),
    paired=(_TINY_MIXED,),
    more=(Batch("tiny_first_token", ((1, 1),), Phase.PREFILL), _TINY_MIXED),
    long=(Batch("tiny_tiles", ((1, 140), (20, 70)), None),),
    trees=(Batch("tiny_tree", ((5, 5), (5, 18)), None),),
    custom=(Batch("tiny_custom", ((4, 4), (5, 21), (1, 17)), None),),
    shared=(Batch("tiny_shared", ((1, 18), (4, 21)), None),),
    common_prefix=16,
    encoder=Batch("tiny_sequences", ((1, 1), (17, 17)), Phase.PREFILL),
    cross=Batch("tiny_cross", ((1, 7), (9, 4), (2, 17)), Phase.PREFILL),
    cross_decode=Batch("tiny_cross_decode", ((1, 7), (1, 1)), Phase.DECODE),
)
"""For kernels that an interpreter runs on the CPU."""
