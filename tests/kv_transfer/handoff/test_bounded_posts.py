"""No WRITE carries more than can be answered for: a part beyond that leaves in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.connector import HandoffReceived, HandoffSent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff import sender
from kv_transfer.handoff.sender_state import SentPart
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.link_cost import LinkCost, most_bytes_at_once
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric

MIB = 1 << 20
LAYERS, NUM_BLOCKS = 3, 16
GROUP = GroupLayout("full", tuple(range(LAYERS)), 1, 1, 1, "float32")
HANDOFF = b"h" * 16


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 7), st.integers(1, 40), st.integers(0, 100))
def test_pieces_are_the_part_and_none_is_too_large(first_layer, num_layers, first_block, num_blocks, limit):
    layers, blocks = range(first_layer, first_layer + num_layers), tuple(range(100, 100 + num_blocks))
    part = SentPart(0, layers, first_block, blocks, None)
    pieces = list(part.pieces(limit))
    cells = [
        (layer, piece.first_block + i, block)
        for piece in pieces
        for layer in piece.layers
        for i, block in enumerate(piece.src_blocks)
    ]
    assert sorted(cells) == [(layer, first_block + i, 100 + i) for layer in part.layers for i in range(num_blocks)]
    assert all(len(piece.layers) * len(piece.src_blocks) <= max(1, limit) for piece in pieces)
    if limit >= num_layers * num_blocks:
        assert pieces == [part]


@pytest.mark.parametrize("limit", [1, 2, 5, 8, 100])
def test_a_handoff_in_pieces_arrives_whole(limit, monkeypatch):
    monkeypatch.setattr(sender, "most_bytes_at_once", lambda cost: limit * GROUP.block_bytes)
    fabric, layout = LocalFabric(), KVLayout((GROUP,))
    caches = [torch.rand(LAYERS, NUM_BLOCKS, 2, 1, 1, 1), torch.zeros(LAYERS, NUM_BLOCKS, 2, 1, 1, 1)]
    p, d = LocalConnector(fabric), LocalConnector(fabric)
    p_info, d_info = (c.register_kv_caches(n, [k], layout) for c, n, k in zip((p, d), "pd", caches, strict=True))
    p.connect(d_info, 1.0)
    d.connect(p_info, 1.0)
    key = d.expect(HANDOFF, p_info.engine_id, [GroupBlocks(1, [9, 8, 3, 4, 11])])
    p.begin(HANDOFF, d_info.engine_id)
    p.push(HANDOFF, 0, range(LAYERS), 0, range(6), None)
    p.finish(HANDOFF, 7)
    events = [event for _ in range(20) for end in (p, d) for event in end.poll()]
    assert HandoffReceived(key, 7) in events
    (sent,) = [event for event in events if isinstance(event, HandoffSent)]
    assert sent.num_bytes == 15 * GROUP.block_bytes
    assert sent.num_parts == {1: 15, 2: 9, 5: 3, 8: 3, 100: 1}[limit]
    assert torch.equal(caches[1][:, [9, 8, 3, 4, 11]], caches[0][:, 1:6])


def test_how_much_is_at_once():
    assert most_bytes_at_once(None) == 4 * MIB
    assert most_bytes_at_once(LinkCost(1e-5, 1e-6, 1e6)) == 4 * MIB
    assert most_bytes_at_once(LinkCost(1e-5, 1e-6, 2e9)) == 10_000_000
    assert most_bytes_at_once(LinkCost(1e-5, 1e-6, 350e9)) == 64 * MIB
