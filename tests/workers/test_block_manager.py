"""No block belongs to two owners, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.block_manager import BlockManager, blocks_for


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "blocks"), [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (7, 1, 7)]
)
def test_blocks_for(num_tokens, block_size, blocks):
    assert blocks_for(num_tokens, block_size) == blocks


def test_more_than_there_is_takes_nothing():
    manager = BlockManager(3)
    manager.allocate(1)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        manager.allocate(3)
    assert manager.num_free == 2


def test_a_block_is_given_back_once():
    manager = BlockManager(4)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[0]} is not in use"):
        manager.free(blocks)
    with pytest.raises(ValueError, match="block 9 is not in use"):
        manager.free([9])
    assert manager.num_free == 4


class BlockManagerMachine(RuleBasedStateMachine):
    """Owners come and go in any order; what each holds is remembered here."""

    @initialize(num_blocks=st.integers(0, 24))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        if count > self.manager.num_free:
            with pytest.raises(ValueError, match="are free"):
                self.manager.allocate(count)
        else:
            self.held.append(self.manager.allocate(count))
            assert len(self.held[-1]) == count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.manager.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_has_one_owner_or_is_free(self) -> None:
        if hasattr(self, "held"):
            owned = [block for blocks in self.held for block in blocks]
            assert len(owned) == len(set(owned))
            assert set(owned) <= set(range(self.manager.num_blocks))
            assert self.manager.num_free == self.manager.num_blocks - len(owned)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
