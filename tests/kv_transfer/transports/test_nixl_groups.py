"""Cache groups over real NIXL: a list of descriptors for each, over regions of unlike blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from kv_transfer.connector import ConnectorEvent, HandoffReceived, HandoffSent
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.nixl_connector import NixlConnector
from kv_transfer.transports.base import EngineInfo

pytestmark = pytest.mark.nixl

LAYOUT = KVLayout(
    (
        GroupLayout("full", (0, 2, 3), 16, 2, 16, "float32"),
        GroupLayout("sliding", (1,), 8, 1, 24, "bfloat16", window=20),
    )
)
NUM_BLOCKS = (32, 11)
PATIENCE_S = 30.0


class End:
    def __init__(self, name: str) -> None:
        self.caches = [
            torch.rand(group.num_layers, blocks, *group.block_shape).to(getattr(torch, group.dtype))
            for group, blocks in zip(LAYOUT.groups, NUM_BLOCKS, strict=True)
        ]
        self.connector = NixlConnector()
        self.info: EngineInfo = self.connector.register_kv_caches(name, self.caches, LAYOUT)

    def next_event(self) -> ConnectorEvent:
        give_up_at = time.monotonic() + PATIENCE_S
        while not (events := self.connector.poll()):
            assert time.monotonic() < give_up_at, "nothing happened"
            time.sleep(0.001)
        (event,) = events
        return event


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    p, d = End("groups-p"), End("groups-d")
    p.connector.connect(d.info, PATIENCE_S)
    d.connector.connect(p.info, PATIENCE_S)
    p.connector.probe(d.info.engine_id, PATIENCE_S)
    yield p, d
    for end in (p, d):
        end.connector.close()


def test_two_groups_arrive_byte_for_byte_and_nothing_else_changes(ends):
    p, d = ends
    rng = torch.Generator().manual_seed(1)
    for number in range(20):
        handoff_id = bytes([number]) * 16
        src = [torch.randperm(blocks, generator=rng)[:5].tolist() for blocks in NUM_BLOCKS]
        dst = [torch.randperm(blocks, generator=rng)[:5].tolist() for blocks in NUM_BLOCKS]
        skip = number % 6  # of the window's blocks, which begin at the sequence's third
        expected = [cache.clone() for cache in d.caches]
        expected[0][:, dst[0]] = p.caches[0][:, src[0]]
        expected[1][:, dst[1][skip:]] = p.caches[1][:, src[1][skip:]]
        key = d.connector.expect(
            handoff_id, p.info.engine_id, [GroupBlocks(0, dst[0]), GroupBlocks(3 + skip, dst[1][skip:])]
        )
        p.connector.begin(handoff_id, d.info.engine_id)
        p.connector.push(handoff_id, 0, range(1), 0, src[0], None)
        p.connector.push(handoff_id, 1, range(1), 3, src[1], None)
        p.connector.push(handoff_id, 0, range(1, 3), 0, src[0], None)
        p.connector.finish(handoff_id, number)
        assert d.next_event() == HandoffReceived(key, number)
        sent = p.next_event()
        assert isinstance(sent, HandoffSent)
        full, window = LAYOUT.groups
        assert sent.num_bytes == 15 * full.block_bytes + (5 - skip if skip < 5 else 0) * window.block_bytes
        assert all(torch.equal(cache, wanted) for cache, wanted in zip(d.caches, expected, strict=True))


def test_each_groups_writes_are_sized_by_its_own_layers(ends):
    p, d = ends
    assert p.connector.layers_per_write(d.info.engine_id, 0, 1, 0.0) == 3
    assert p.connector.layers_per_write(d.info.engine_id, 1, 1, 0.0) == 1
