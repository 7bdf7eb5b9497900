"""Blocks that lie together on both sides travel as one descriptor, and every byte arrives where it should."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.transports.base import TransferState
from kv_transfer.transports.nixl import NixlTransport
from kv_transfer.transports.nixl_endpoint import NixlTransfer

pytestmark = pytest.mark.nixl

LAYERS, NUM_BLOCKS = 3, 32
LAYOUT = KVLayout((GroupLayout("full", tuple(range(LAYERS)), 4, 2, 8, "float32"),))
Ends = tuple[list[NixlTransport], list[torch.Tensor], list[str]]


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    """Two agents of this process that know each other: transports, caches, engine ids."""
    transports = [NixlTransport(count_descriptors=True) for _ in range(2)]
    caches = [torch.zeros(LAYERS, NUM_BLOCKS, 2, 4, 2, 8) for _ in range(2)]
    infos = [
        transport.register(name, 1, [cache], LAYOUT)
        for transport, name, cache in zip(transports, ("coalescing-p", "coalescing-d"), caches, strict=True)
    ]
    transports[0].add_peer(infos[1])
    transports[1].add_peer(infos[0])
    yield transports, caches, [info.engine_id for info in infos]
    for transport in transports:
        transport.close()


def write(ends: Ends, layers: range, src: list[int], dst: list[int]) -> NixlTransfer:
    (sender, receiver), _, ids = ends
    transfer = sender.write(ids[1], 0, layers, src, dst, b"landed")
    while transfer.state() is TransferState.IN_FLIGHT:
        receiver.receive()
    assert transfer.state() is TransferState.DONE
    messages: list[tuple[str, bytes]] = []
    while not messages:
        sender.receive()
        messages = receiver.receive()
    assert messages == [(ids[0], b"landed")]
    assert isinstance(transfer, NixlTransfer)
    return transfer


def runs(layers: range, src: list[int], dst: list[int]) -> int:
    """Pieces of memory that lie together on both sides, the end of one layer and the start of the next included."""
    pairs = [
        (layer * NUM_BLOCKS + s, layer * NUM_BLOCKS + d) for layer in layers for s, d in zip(src, dst, strict=True)
    ]
    return 1 + sum((a[0] + 1, a[1] + 1) != b for a, b in itertools.pairwise(pairs))


@st.composite
def moves(draw: st.DrawFn) -> tuple[range, list[int], list[int]]:
    """Layers, and pairs of blocks made of runs of any length in any order."""
    first = draw(st.integers(0, LAYERS - 1))
    layers = range(first, draw(st.integers(first + 1, LAYERS)))
    sides = []
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda v: sum(v) <= NUM_BLOCKS))
    for _ in range(2):
        order = draw(st.permutations(range(len(lengths))))
        gap = draw(st.integers(0, NUM_BLOCKS - sum(lengths)))
        starts, at = [0] * len(lengths), gap
        for place in order:
            starts[place], at = at, at + lengths[place]
        sides.append([start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)])
    if draw(st.booleans()):
        order = draw(st.permutations(range(sum(lengths))))
        sides = [[side[i] for i in order] for side in sides]
    return layers, sides[0], sides[1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(move=moves())
def test_every_byte_arrives_in_as_few_pieces_as_there_are(ends: Ends, move: tuple[range, list[int], list[int]]) -> None:
    layers, src, dst = move
    _, (source, target), _ = ends
    source.copy_(torch.rand(source.shape))
    before = target.copy_(torch.rand(target.shape)).clone()
    transfer = write(ends, layers, src, dst)
    before[layers.start : layers.stop, dst] = source[layers.start : layers.stop, src]
    assert torch.equal(target, before)
    assert transfer.num_descriptors == runs(layers, src, dst)


def test_a_layer_that_lies_together_is_one_descriptor(ends: Ends) -> None:
    assert write(ends, range(2), list(range(8, 20)), list(range(3, 15))).num_descriptors == 2
    assert write(ends, range(1, 2), list(range(12)), list(range(3, 15))).num_descriptors == 1
    assert write(ends, range(1, 2), list(range(0, 24, 2)), list(range(3, 15))).num_descriptors == 12


def test_reading_takes_a_peers_blocks(ends: Ends) -> None:
    (reader, other), (own, theirs), ids = ends
    own.zero_()
    theirs.copy_(torch.rand(theirs.shape))
    transfer = reader.read(ids[1], 0, range(1, 3), [4, 5, 9], [0, 7, 8])
    while transfer.state() is TransferState.IN_FLIGHT:
        other.receive()
    assert torch.equal(own[1:3, [0, 7, 8]], theirs[1:3, [4, 5, 9]])
    assert own[0].abs().sum() == 0
