"""Blocks by content: found while they are right, kept while there is room, shared and never lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.block_hashes import BlockHashes, block_hashes
from workers.kv_cache import prefix_cache
from workers.kv_cache.prefix_cache import PrefixCache

BLOCK_SIZE = 2

INT32 = st.integers(-(2**31), 2**31 - 1)


def hashes(text: str) -> tuple[bytes, ...]:
    return block_hashes([ord(letter) for letter in text], BLOCK_SIZE)


def computed(cache: PrefixCache, text: str) -> list[int]:
    """The blocks of a prompt that was computed just now, still in use."""
    blocks, _ = cache.allocate(hashes(text), len(hashes(text)))
    for block, content in zip(blocks, hashes(text), strict=True):
        cache.store(block, content)
    return blocks


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.lists(st.integers(0, 3), max_size=8), st.integers(1, 5)
)
def test_equal_hashes_mean_equal_beginnings(token_ids, others, block_size):
    ours = block_hashes(token_ids, block_size)
    assert len(ours) == len(token_ids) // block_size == len(set(ours))
    assert ours == block_hashes(np.array(token_ids, dtype=np.int64), block_size)
    changed = [*others, *token_ids[len(others) :]]
    for place, (one, other) in enumerate(zip(ours, block_hashes(changed, block_size), strict=False)):
        end = (place + 1) * block_size
        assert (one == other) == (token_ids[:end] == changed[:end])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.lists(st.integers(0, 8), max_size=6), st.integers(1, 5))
def test_hashes_that_are_continued_are_those_of_the_whole(token_ids, pieces, block_size):
    """Block by block, in whatever pieces."""
    running, start = BlockHashes(block_size), 0
    for num_blocks in pieces:
        running.extend(token_ids[start : start + num_blocks * block_size])
        start = len(running) * block_size
    running.extend(token_ids[start:])
    assert tuple(running) == block_hashes(token_ids, block_size)


def test_a_prompt_takes_over_what_it_begins_with():
    cache = PrefixCache(8)
    first = computed(cache, "aabbcc")
    blocks, found = cache.allocate(hashes("aabbdd"), 4)
    assert (blocks[:2], found) == (first[:2], 2)
    assert not set(blocks[2:]) & set(first)
    cache.release(first)
    assert cache.num_free == 4, "two are still in use by the other"
    cache.release(blocks)
    assert (cache.num_free, cache.num_stored) == (8, 3)


def test_a_beginning_that_is_missing_hides_what_follows():
    cache = PrefixCache(8)
    first = computed(cache, "aabbcc")
    cache.forget(first[:1])
    assert cache.allocate(hashes("aabbcc"), 3)[1] == 0


def test_the_least_recently_used_goes_first_and_a_beginning_last():
    cache = PrefixCache(6)
    old, new = computed(cache, "aabbcc"), computed(cache, "xxyyzz")
    cache.release(old)
    cache.release(new)
    cache.release(cache.allocate(hashes("aa"), 1)[0])
    own, found = cache.allocate((), 3)
    assert (found, cache.num_stored) == (0, 3)
    assert set(own) == {old[1], old[2], new[2]}
    assert cache.allocate(hashes("xxyyzz"), 3)[0][:2] == new[:2]


def test_prompts_that_nobody_repeats_take_nothing_that_others_share():
    cache = PrefixCache(8)
    cache.release(computed(cache, "aabb"))
    shared, found = cache.allocate(hashes("aabb"), 2)
    assert found == 2
    cache.release(shared)
    for number in range(20):
        cache.release(computed(cache, chr(200 + number) * 12))
        assert cache.find(hashes("aabb")) == shared
    assert cache.fits((), 8), "but what is needed is there"
    cache.release(cache.allocate((), 8)[0])
    assert cache.find(hashes("aabb")) == []


def test_what_was_repeated_long_ago_is_as_anything_else():
    cache = PrefixCache(8)  # six of them go last at most
    for letter in "abcdefgh":
        cache.release(computed(cache, letter * 2))
        cache.release(cache.allocate(hashes(letter * 2), 1)[0])
    cache.release(cache.allocate((), 2)[0])
    assert [bool(cache.find(hashes(letter * 2))) for letter in "abcdefgh"] == [False] * 2 + [True] * 6


def test_samples_of_one_prompt_do_not_repeat_it():
    cache = PrefixCache(4)
    blocks = computed(cache, "aabb")
    cache.share(blocks)
    for _ in range(2):
        cache.release(blocks)
    cache.release(computed(cache, "xxyyzz"))
    assert len(cache.find(hashes("aabb"))) < 2


def test_what_is_found_is_not_evicted_for_the_rest():
    cache = PrefixCache(4)
    cache.release(computed(cache, "aabb"))
    cache.release(computed(cache, "ccdd"))
    assert cache.fits(hashes("aabb"), 4)
    blocks, found = cache.allocate(hashes("aabb"), 4)
    assert (found, len(set(blocks))) == (2, 4)


def test_what_is_found_counts_once():
    cache = PrefixCache(4)
    held = computed(cache, "aabb")
    assert cache.fits(hashes("aabb"), 4), "two are shared, two are free"
    assert not cache.fits((), 3)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        cache.allocate((), 3)
    cache.release(held)
    assert not cache.fits(hashes("aabb"), 5), "those that are found are no longer free for the rest"


def test_of_two_blocks_with_the_same_content_the_first_is_kept():
    cache = PrefixCache(4)
    (first,), _ = cache.allocate((), 1)
    (second,), _ = cache.allocate((), 1)
    cache.store(first, b"content")
    cache.store(second, b"content")
    cache.release([second])
    assert (cache.num_stored, cache.allocate([b"content"], 1)[0]) == (1, [first])


def test_only_blocks_in_use_are_given_back_or_stored():
    cache = PrefixCache(4)
    blocks = computed(cache, "aabb")
    cache.release(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[1]} is not in use"):
        cache.release(blocks)
    with pytest.raises(ValueError, match="block 3 is not in use"):
        cache.store(3, b"content")
    assert cache.num_free == 4


def test_updates_say_what_has_changed_and_no_more_than_a_few_thousand_at_once(monkeypatch):
    monkeypatch.setattr(prefix_cache, "MAX_HASHES_TOLD", 2)
    cache = PrefixCache(3)
    assert cache.take_update() is None
    aa, bb, cc = hashes("aabbcc")
    blocks = computed(cache, "aabbcc")
    assert cache.take_update() == prefix_cache.CacheUpdate((aa, bb), ())
    assert cache.take_update() == prefix_cache.CacheUpdate((cc,), ())
    cache.release(blocks)
    cache.release(cache.allocate((), 1)[0])
    blocks = computed(cache, "aabbcc")
    assert cache.take_update() is None, "what came back was never missed"
    cache.release(blocks)
    cache.allocate((), 3)
    removed = [cache.take_update().removed for _ in range(2)]
    assert {content for part in removed for content in part} == {aa, bb, cc}
    assert cache.take_update() is None


class PrefixCacheMachine(RuleBasedStateMachine):
    """Prompts over two letters come, are computed block by block and go. What each block really holds is kept here: a
    block that is handed out anew holds nothing."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.cache = PrefixCache(num_blocks)
        self.memory: dict[int, str] = {}
        self.prompts: list[tuple[str, list[int], int]] = []  # text, blocks, how many are computed
        self.told: set[bytes] = set()

    @rule(text=st.text("ab", max_size=14), more=st.integers(0, 2), owner=st.sampled_from(("", "ann", "bob")))
    def admit(self, text: str, more: int, owner: str) -> None:
        known, count = hashes(text), len(hashes(text)) + more
        if not self.cache.fits(known, count):
            with pytest.raises(ValueError, match="are free"):
                self.cache.allocate(known, count)
            return
        in_use = {block for _, blocks, _ in self.prompts for block in blocks}
        blocks, found = self.cache.allocate(known, count, owner)
        assert len(set(blocks)) == count
        for place in range(found):
            assert self.memory[blocks[place]] == text[: (place + 1) * BLOCK_SIZE], "wrong content"
        for block in blocks[found:]:
            assert block not in in_use
            self.memory.pop(block, None)
        self.prompts.append((text, blocks, found))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.prompts) - 1))
        text, blocks, done = self.prompts[which]
        if done < len(hashes(text)):
            self.memory[blocks[done]] = text[: (done + 1) * BLOCK_SIZE]
            self.cache.store(blocks[done], hashes(text)[done])
            self.prompts[which] = (text, blocks, done + 1)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), broken=st.booleans())
    def leave(self, data: st.DataObject, broken: bool) -> None:
        _, blocks, _ = self.prompts.pop(data.draw(st.integers(0, len(self.prompts) - 1)))
        if broken:
            self.cache.forget(blocks)
            for block in blocks:
                self.memory[block] = "garbage"
        self.cache.release(blocks)

    @rule()
    def tell(self) -> None:
        if update := self.cache.take_update():
            assert not self.told & set(update.stored)
            assert set(update.removed) <= self.told
            self.told = (self.told | set(update.stored)) - set(update.removed)
        assert self.told == set(self.cache.stored_blocks)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "prompts"):
            in_use = {block for _, blocks, _ in self.prompts for block in blocks}
            assert self.cache.num_free == self.cache.num_blocks - len(in_use)
            assert self.cache.fits((), self.cache.num_free)
            kept = {block for block in self.cache.stored_blocks.values() if block not in in_use}
            assert sum(self.cache.held_by_owners.values()) == len(in_use) + len(kept)
            assert all(self.cache.held_by_owners.values())


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_last_block_is_one_like_any_other() -> None:
    """Whatever the id of the first."""
    for first in (0, 1, 5):
        cache = PrefixCache(3, first)
        blocks = cache.take(3)
        for block in blocks:
            cache.store(block, bytes([block]))
        assert cache.find([bytes([block]) for block in blocks]) == blocks == list(range(first, first + 3))
        assert [cache.num_users(block) for block in range(first + 4)] == [0] * first + [1] * 3 + [0]
        cache.release(blocks)
        assert cache.num_stored == cache.num_free == 3
