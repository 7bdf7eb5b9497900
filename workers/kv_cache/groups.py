"""The blocks of one cache group, and what its kind means for a sequence. Plain integers and hashes.

What a model keeps of a sequence in another form, such as a recurrent state, is another class here: a table of one
entry that neither grows nor is found by blocks' hashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attention.kv_cache import KVCacheSpec
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.prefix_cache import PrefixCache
from workers.kv_cache.tables import NULL_BLOCK, BlockTable
from workers.kv_cache.window_pool import WindowPool
from workers.kv_cache.windows import first_needed_block, most_sequence_blocks

Hashes = Sequence[bytes]


class CacheGroup:
    """Full attention and MLA: a sequence keeps all of its blocks, and a prompt has them from its admission on.

    Attributes:
        block_size: tokens in a block.
        num_layers: that keep it.
        pool: the blocks.

    Args:
        spec: what the layers keep.
        pool: all of its blocks.
        stride: hashes that sequences have for each of its blocks: theirs are by the smallest blocks of all groups.
    """

    def __init__(self, spec: KVCacheSpec, pool: PrefixCache, stride: int = 1) -> None:
        self.block_size = spec.block_size
        self.num_layers = spec.num_layers
        self.pool = pool
        self._stride = stride

    def hashes(self, hashes: Hashes) -> Hashes:
        """Those of a sequence's hashes that are of this group's blocks."""
        if self._stride == 1:
            return hashes
        return [hashes[place] for place in range(self._stride - 1, len(hashes), self._stride)]

    def first_needed(self, num_computed: int) -> int:
        """The first place whose block the next query sees, when so many tokens are in the cache."""
        return 0

    def release_at(self, table: BlockTable) -> float:
        """As soon as so many tokens are in the cache, a block that the table has is not seen any more."""
        return math.inf

    def most_blocks(self, num_tokens: int, in_flight: int) -> int:
        """The most blocks that a sequence holds at once until it has so many tokens.

        Args:
            num_tokens: of the sequence.
            in_flight: the most of them that are being computed at once.
        """
        return blocks_for(num_tokens, self.block_size)

    def handed_over(self, start: int, end: int, num_tokens: int) -> range:
        """The places of a prompt's blocks that are complete with its tokens from `start` to before `end`.

        Those that no query behind the prompt sees are left out. A half-filled block comes with the prompt's end alone:
        two WRITEs of one block could land in either order.

        Args:
            start: where the tokens begin; the beginning of a block, or whatever the call before ended with.
            end: where they end.
            num_tokens: of the whole prompt.
        """
        first = max(start // self.block_size, self.first_needed(num_tokens))
        full = blocks_for(end, self.block_size) if end == num_tokens else end // self.block_size
        return range(first, max(first, full))

    # prompts that are computed here

    def usable(self, hashes: Hashes, ends: range) -> range | list[int]:
        """At which of these numbers of tokens a prompt could begin to be computed, with what is here; ascending."""
        return range(
            ends.start, min(ends.stop, len(self.pool.find(self.hashes(hashes))) * self.block_size + 1), ends.step
        )

    def fits_prompt(self, hashes: Hashes, num_found: int, num_tokens: int, in_flight: int, more: int = 0) -> bool:
        """Whether `admit_prompt` would succeed, and leave so many `more` blocks free."""
        return self.pool.fits(
            self.hashes(hashes)[: num_found // self.block_size], blocks_for(num_tokens, self.block_size) + more
        )

    def admit_prompt(self, hashes: Hashes, num_found: int, num_tokens: int, in_flight: int, owner: str) -> BlockTable:
        """Take what a prompt needs so that it always ends.

        Args:
            hashes: of its blocks.
            num_found: its first tokens that are `usable`.
            num_tokens: of all of it.
            in_flight: the most tokens of it that are being computed at once.
            owner: whose it is.
        """
        found = self.hashes(hashes)[: num_found // self.block_size]
        blocks, _ = self.pool.allocate(found, blocks_for(num_tokens, self.block_size), owner)
        return BlockTable(blocks, owner=owner)

    def settle(self, table: BlockTable) -> None:
        """A prompt is computed: from now on it grows as long as there are free blocks."""

    # what comes from elsewhere

    def blocks_behind(self, num_computed: int, num_tokens: int) -> int:
        """Blocks that `admit` takes, those that are found included."""
        return blocks_for(num_tokens, self.block_size) - self.first_needed(num_computed)

    def fits(self, hashes: Hashes, num_computed: int, num_tokens: int, more: int = 0) -> bool:
        """Whether `admit` would succeed, and leave so many `more` blocks free."""
        start = self.first_needed(num_computed)
        return self.pool.fits(self.hashes(hashes)[start:], blocks_for(num_tokens, self.block_size) - start + more)

    def admit(self, hashes: Hashes, num_computed: int, num_tokens: int, owner: str) -> tuple[BlockTable, int]:
        """Take the blocks for so many tokens that the query behind `num_computed` of them sees, for their owner.

        Returns:
            The table, and how many of its blocks, the first ones, are found here with their content.
        """
        start = self.first_needed(num_computed)
        count = blocks_for(num_tokens, self.block_size) - start
        blocks, found = self.pool.allocate(self.hashes(hashes)[start:], count, owner)
        return BlockTable([NULL_BLOCK] * start + blocks, start, owner=owner), found

    # sequences

    def fork(self, table: BlockTable, num_tokens: int) -> tuple[BlockTable, int | None]:
        """A table for one more sequence that goes on from these tokens, which are in the cache: full blocks are shared.

        Returns:
            The table, and the block whose content is to be copied into its last one; None: there is none half full.

        Raises:
            ValueError: there is no free block for the copy.
        """
        full = num_tokens // self.block_size
        partial = table.blocks[full] if num_tokens % self.block_size else None
        own = [] if partial is None else self.pool.take(1, table.owner)
        self.pool.share(table.blocks[table.start : full])
        return BlockTable(table.blocks[:full] + own, table.start, owner=table.owner), partial

    def missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that it lacks for so many tokens."""
        return blocks_for(num_tokens, self.block_size) - len(table.blocks)

    def extend(self, table: BlockTable, count: int) -> None:
        """Take so many blocks behind its last."""
        table.blocks += self.pool.take(count, table.owner)

    def store(self, table: BlockTable, hashes: Hashes, start: int, end: int) -> None:
        """The tokens from `start` to before `end` are in the cache: keep the blocks that are full with them."""
        for place in range(max(start // self.block_size, table.start), end // self.block_size):
            self.pool.store(table.blocks[place], hashes[(place + 1) * self._stride - 1])

    def drop(self, table: BlockTable, end: int) -> None:
        """Give the blocks at the places before `end` back."""
        self.pool.release(table.drop(end))

    def release(self, table: BlockTable) -> None:
        """Give all blocks back."""
        self.drop(table, len(table.blocks))

    def forget(self, table: BlockTable, hashes: Hashes) -> None:
        """What is in its blocks may be wrong: it is not to be found any more."""
        self.pool.forget(table.held)


class WindowGroup(CacheGroup):
    """A sliding window: what no query will see again is given back while the sequence runs.

    A prompt is promised the most blocks that it will hold at once, and takes them as it is computed.

    Args:
        spec: what the layers keep; with a window.
        pool: all of its blocks.
        stride: see `CacheGroup`.
    """

    pool: WindowPool

    def __init__(self, spec: KVCacheSpec, pool: WindowPool, stride: int = 1) -> None:
        super().__init__(spec, pool, stride)
        if spec.window is None:
            raise ValueError("a sliding group has a window")
        self._window = spec.window

    def first_needed(self, num_computed: int) -> int:
        """See `CacheGroup.first_needed`."""
        return first_needed_block(num_computed, self._window, self.block_size)

    def release_at(self, table: BlockTable) -> float:
        """See `CacheGroup.release_at`."""
        return (table.start + 1) * self.block_size + self._window - 1

    def most_blocks(self, num_tokens: int, in_flight: int) -> int:
        """See `CacheGroup.most_blocks`."""
        return most_sequence_blocks(num_tokens, self._window, in_flight, self.block_size)

    def usable(self, hashes: Hashes, ends: range) -> range | list[int]:
        """See `CacheGroup.usable`: the blocks that the next query would see are here."""
        usable, run, place = [], 0, 0
        here = self.pool.find_each(self.hashes(hashes))
        for end in ends:
            while place < end // self.block_size:
                run = run + 1 if here[place] is not None else 0
                place += 1
            if run >= place - self.first_needed(end):
                usable.append(end)
        return usable

    def fits_prompt(self, hashes: Hashes, num_found: int, num_tokens: int, in_flight: int, more: int = 0) -> bool:
        """See `CacheGroup.fits_prompt`."""
        return self.most_blocks(num_tokens, in_flight) + more <= self.pool.num_free

    def admit_prompt(self, hashes: Hashes, num_found: int, num_tokens: int, in_flight: int, owner: str) -> BlockTable:
        """See `CacheGroup.admit_prompt`."""
        start, end = self.first_needed(num_found), num_found // self.block_size
        promised = self.most_blocks(num_tokens, in_flight)
        self.pool.promise(promised)
        found = self.pool.find(self.hashes(hashes)[start:end])
        self.pool.share(found, promised=True)
        self.pool.repeat(found, owner)
        return BlockTable([NULL_BLOCK] * start + found, start, promised, owner)

    def settle(self, table: BlockTable) -> None:
        """See `CacheGroup.settle`."""
        if table.promised:
            self.pool.withdraw(table.promised, table.held)
            table.promised = 0

    def extend(self, table: BlockTable, count: int) -> None:
        """See `CacheGroup.extend`."""
        table.blocks += self.pool.take(count, table.owner, promised=table.promised > 0)

    def drop(self, table: BlockTable, end: int) -> None:
        """See `CacheGroup.drop`."""
        self.pool.release(table.drop(end), promised=table.promised > 0)

    def release(self, table: BlockTable) -> None:
        """See `CacheGroup.release`."""
        self.settle(table)
        super().release(table)

    def forget(self, table: BlockTable, hashes: Hashes) -> None:
        """See `CacheGroup.forget`: what it has given back before, too."""
        super().forget(table, hashes)
        self.pool.forget_content(self.hashes(hashes)[: table.start])
