"""No block belongs to two owners, none is lost, and what is asked for together lies together where it can."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.kv_cache.block_pool import BlockPool, blocks_for


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "blocks"), [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (7, 1, 7)]
)
def test_blocks_for(num_tokens, block_size, blocks):
    assert blocks_for(num_tokens, block_size) == blocks


def test_more_than_there_is_takes_nothing():
    manager = BlockPool(3)
    manager.allocate(1)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        manager.allocate(3)
    assert manager.num_free == 2


def test_a_block_is_given_back_once():
    manager = BlockPool(4)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[0]} is not in use"):
        manager.free(blocks)
    with pytest.raises(ValueError, match="block 9 is not in use"):
        manager.free([9])
    assert manager.num_free == 4


def test_a_prompt_takes_the_smallest_run_that_holds_it():
    manager = BlockPool(20)
    whole = manager.allocate(20)
    assert whole == list(range(20))
    manager.free([1, 2, 3, 4, 8, 9, 10, 15, 16, 17, 18, 19])
    assert manager.allocate(3) == [8, 9, 10]
    assert manager.allocate(4) == [1, 2, 3, 4]
    assert manager.largest_extent == 5


def test_where_no_run_is_long_enough_the_longest_ones_are_used():
    manager = BlockPool(12)
    manager.allocate(12)
    manager.free([0, 4, 5, 6, 9, 10])
    assert manager.allocate(5) == [4, 5, 6, 9, 10]
    assert manager.allocate(1) == [0]
    assert (manager.num_free, manager.largest_extent) == (0, 0)


def test_growing_sequences_do_not_fragment_what_prompts_need():
    manager = BlockPool(64)
    growing = [block for _ in range(8) for block in manager.allocate(1)]
    assert sorted(growing) == list(range(56, 64))
    assert manager.allocate(56) == list(range(56))


def test_neighbours_become_one_run_again_in_whatever_order_they_come_back():
    manager = BlockPool(9)
    blocks = manager.allocate(9)
    for block in (4, 2, 6, 0, 8, 3, 5, 1, 7):
        manager.free([blocks[block]])
    assert manager.allocate(9) == list(range(9))


class BlockManagerMachine(RuleBasedStateMachine):
    """Owners come and go in any order; what each holds is remembered here."""

    @initialize(num_blocks=st.integers(0, 24))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockPool(num_blocks)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        if count > self.manager.num_free:
            with pytest.raises(ValueError, match="are free"):
                self.manager.allocate(count)
        else:
            longest = self._longest_free_run()
            assert self.manager.largest_extent == longest
            blocks = self.manager.allocate(count)
            self.held.append(blocks)
            assert len(blocks) == count
            if 0 < count <= longest:
                assert blocks == list(range(blocks[0], blocks[0] + count)), "there was a run for it"

    def _longest_free_run(self) -> int:
        owned = {block for blocks in self.held for block in blocks}
        longest = run = 0
        for block in range(self.manager.num_blocks):
            run = 0 if block in owned else run + 1
            longest = max(longest, run)
        return longest

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
