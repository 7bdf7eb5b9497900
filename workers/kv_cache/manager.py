"""The KV cache of a worker as its schedulers see it: blocks of every cache group for every sequence.

A sequence has one block table in each group. What the groups of a model have in common is done here; what their kind
means is done in `groups`. Plain integers and hashes; knows neither tensors nor requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from attention.kv_cache import KVCacheSpec
from kv_transfer.layout import primary_group
from workers.kv_cache.groups import CacheGroup, Hashes, WindowGroup
from workers.kv_cache.prefix_cache import PrefixCache
from workers.kv_cache.tables import NULL_BLOCK, SequenceTables
from workers.kv_cache.window_pool import WindowPool
from workers.messages import CacheUpdate


class KVCacheManager:
    """The blocks of a worker's cache, group by group.

    What a step in flight may read or write is not given back: a block behind a window is free when the steps that were
    launched while it was in the table have landed, see `land` and `row_tables`.

    Attributes:
        groups: one for each cache group of the model.
        primary: which of them the worker's load is told of: the first that keeps all blocks, else the one of the
            largest window.
        block_size: tokens in the smallest blocks, by which sequences are hashed.

    Args:
        specs: the model's cache groups.
        num_blocks: of each group's tensor. Block 0 of a sliding group is used by nobody: it stands for the blocks that
            were given back.
        prompt_tokens_in_flight: the most tokens of one prompt that steps in flight compute at once.
        decode_tokens_in_flight: the same of a sequence that decodes.

    Raises:
        ValueError: a block size that is no multiple of the smallest.
    """

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        num_blocks: Sequence[int],
        *,
        prompt_tokens_in_flight: int = 1,
        decode_tokens_in_flight: int = 1,
    ) -> None:
        self.block_size = min(spec.block_size for spec in specs)
        self.groups = tuple(_group(spec, count, self.block_size) for spec, count in zip(specs, num_blocks, strict=True))
        self.primary = primary_group([spec.window for spec in specs])
        self._primary = self.groups[self.primary]
        self._hit_tokens = math.lcm(*(spec.block_size for spec in specs))
        self._prompt_tokens_in_flight = prompt_tokens_in_flight
        self._decode_tokens_in_flight = decode_tokens_in_flight

    # what the worker says of itself, in blocks of the primary group

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._primary.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nobody was promised."""
        return self._primary.pool.num_free

    @property
    def primary_pool(self) -> PrefixCache:
        """The blocks of the primary group."""
        return self._primary.pool

    def held(self, tables: SequenceTables) -> list[int]:
        """The blocks that a sequence holds."""
        return tables.groups[self.primary].held if tables.groups else []

    def num_held(self, tables: SequenceTables) -> int:
        """How many these are."""
        return tables.groups[self.primary].num_held if tables.groups else 0

    def take_update(self) -> CacheUpdate | None:
        """What the prefix cache can find now and could not at the last update, and the other way round."""
        for group in self.groups:  # those of the others are nobody's concern, and must not pile up
            update = group.pool.take_update()
            if group is self._primary:
                primary = update
        return primary

    def blocks_per_sequence(self, max_model_len: int, *, computed: bool) -> int | None:
        """The most blocks that a sequence holds at once; None: those of all its tokens.

        Args:
            max_model_len: tokens of the longest sequence.
            computed: of one whose prompt is computed, otherwise of one that decodes.
        """
        in_flight = self._prompt_tokens_in_flight if computed else self._decode_tokens_in_flight
        most = self._primary.most_blocks(max_model_len, in_flight)
        return most if isinstance(self._primary, WindowGroup) else None

    def too_small(self, num_tokens: int, *, computed: bool, samples: int = 1) -> tuple[int, int] | None:
        """The blocks that a prompt of so many tokens needs and those that there are, of a group that cannot hold it.

        Args:
            num_tokens: of the prompt, with those behind it for which there must be room.
            computed: whether it is computed here.
            samples: sequences that go on from its end; each has a block of its own at least.
        """
        in_flight = self._prompt_tokens_in_flight if computed else self._decode_tokens_in_flight
        for group in self.groups:
            needed = group.most_blocks(num_tokens, in_flight) + samples - 1
            if needed > group.pool.num_blocks:
                return needed, group.pool.num_blocks
        return None

    # what is in quarantine

    def blocks_of(self, tables: Iterable[SequenceTables]) -> list[set[int]]:
        """In each group the blocks that some of these sequences hold."""
        blocks: list[set[int]] = [set() for _ in self.groups]
        for each in tables:
            for own, table in zip(blocks, each.groups, strict=False):
                own.update(table.held)
        return blocks

    def has_enough(self, needed: Sequence[int], hashes: Hashes, quarantined: Sequence[AbstractSet[int]]) -> bool:
        """Whether a sequence could have so many blocks of each group at some time, with these in quarantine until then.

        Args:
            needed: blocks of each group.
            hashes: of those that it would take from the cache, where one in quarantine is as good as another.
            quarantined: blocks of each group.
        """
        for group, count, out in zip(self.groups, needed, quarantined, strict=True):
            here = group.pool.find_each(group.hashes(hashes)) if out else ()
            if count > group.pool.num_blocks - len(out - set(here)):
                return False
        return True

    # prompts that are computed here

    def prompt_blocks(self, num_tokens: int, samples: int = 1) -> list[int]:
        """What `admit_prompt` takes at most of each group, with a block for each sample but the first besides."""
        return [group.most_blocks(num_tokens, self._prompt_tokens_in_flight) + samples - 1 for group in self.groups]

    def fits_prompt(self, hashes: Hashes, num_tokens: int, samples: int = 1) -> bool:
        """Whether `admit_prompt` would succeed, with a block for each sample but the first besides."""
        return self._fits_prompt(hashes, 0, num_tokens, samples - 1) or self._fits_prompt(
            hashes, self._found(hashes), num_tokens, samples - 1
        )

    def admit_prompt(self, hashes: Hashes, num_tokens: int, owner: str = "") -> tuple[SequenceTables, int]:
        """Take what a prompt needs so that it always ends: blocks of its beginning that are here, and others.

        Args:
            hashes: of its leading blocks, as far as they may be taken from the cache.
            num_tokens: of all of it.
            owner: whose the blocks are that it takes.

        Returns:
            Its tables, and how many of its tokens are in the cache already.

        Raises:
            ValueError: there are not enough blocks; ask `fits_prompt` first.
        """
        found = self._found(hashes)
        if not self._fits_prompt(hashes, found, num_tokens):
            raise ValueError(f"too few blocks for a prompt of {num_tokens} tokens: {self.num_free} are free")
        in_flight = self._prompt_tokens_in_flight
        tables = SequenceTables(
            [group.admit_prompt(hashes, found, num_tokens, in_flight, owner) for group in self.groups]
        )
        self._note(tables)
        return tables, found

    def settle(self, tables: SequenceTables) -> None:
        """A prompt is computed: what it was promised beyond the blocks that it holds is free for others."""
        for group, table in zip(self.groups, tables.groups, strict=False):
            group.settle(table)

    # what comes from elsewhere: a handoff, or host memory

    def blocks_behind(self, num_computed: int, num_tokens: int, samples: int = 1) -> list[int]:
        """What `admit` takes of each group, with a block for each sample but the first besides."""
        return [group.blocks_behind(num_computed, num_tokens) + samples - 1 for group in self.groups]

    def fits(self, hashes: Hashes, num_computed: int, num_tokens: int, samples: int = 1) -> bool:
        """Whether `admit` would succeed, with a block for each sample but the first besides."""
        return all(group.fits(hashes, num_computed, num_tokens, samples - 1) for group in self.groups)

    def admit(
        self, hashes: Hashes, num_computed: int, num_tokens: int, owner: str = ""
    ) -> tuple[SequenceTables, tuple[int, ...]]:
        """Take blocks for a sequence's tokens, as far as queries behind the first `num_computed` of them see them.

        Args:
            hashes: of its leading blocks, as far as they may be taken from the cache.
            num_computed: tokens that will be in the cache before it goes on.
            num_tokens: for which it needs blocks.
            owner: whose the blocks are that it takes.

        Returns:
            Its tables, and for each group how many of the blocks, the first ones, hold their content already.

        Raises:
            ValueError: there are not enough blocks; ask `fits` first.
        """
        if not self.fits(hashes, num_computed, num_tokens):
            raise ValueError(f"too few blocks for {num_tokens} tokens: {self.num_free} are free")
        admitted = [group.admit(hashes, num_computed, num_tokens, owner) for group in self.groups]
        tables = SequenceTables([table for table, _ in admitted])
        self._note(tables)
        return tables, tuple(found for _, found in admitted)

    # several sequences that go on from one prompt

    def can_fork(self, num_tokens: int, count: int = 1) -> bool:
        """Whether there are free blocks to `fork` a sequence of so many tokens so often."""
        return all(group.pool.num_free >= count for group in self.groups if num_tokens % group.block_size)

    def fork(self, tables: SequenceTables, num_tokens: int) -> tuple[SequenceTables, list[int | None]]:
        """Tables for one more sequence that goes on from these tokens, all of which are in the cache.

        Full blocks are shared by count: nobody writes to them again. A half-full one has a copy.

        Returns:
            The tables, and for each group the block that is to be copied into the last one of its table; None: none.

        Raises:
            ValueError: there are not enough blocks; ask `can_fork` first.
        """
        if not self.can_fork(num_tokens):
            raise ValueError(f"too few blocks for one more sample: {self.num_free} are free")
        forked = [group.fork(table, num_tokens) for group, table in zip(self.groups, tables.groups, strict=True)]
        own = SequenceTables([table for table, _ in forked])
        self._note(own)
        return own, [source for _, source in forked]

    # sequences that run

    def can_extend(self, wanted: Iterable[tuple[SequenceTables, int]]) -> bool:
        """Whether there are free blocks for these sequences to have so many tokens each, all together."""
        missing = [0] * len(self.groups)
        for tables, num_tokens in wanted:
            for i, (group, table) in enumerate(zip(self.groups, tables.groups, strict=True)):
                missing[i] += max(0, group.missing(table, num_tokens))
        return all(count <= group.pool.num_free for count, group in zip(missing, self.groups, strict=True))

    def extend(self, tables: SequenceTables, num_tokens: int) -> None:
        """Take the blocks that a sequence lacks for so many tokens; ask `can_extend` first, or hold a promise."""
        for group, table in zip(self.groups, tables.groups, strict=True):
            if (count := group.missing(table, num_tokens)) > 0:
                group.extend(table, count)
        self._note(tables)

    def row_tables(self, tables: SequenceTables, num_computed: int) -> list[Sequence[int]]:
        """The tables for a step whose first query comes behind so many tokens; what it does not see is not in them.

        So a step is not touched by what becomes of those blocks: kernels load more than they see.
        """
        rows: list[Sequence[int]] = []
        for group, table in zip(self.groups, tables.groups, strict=True):
            start = group.first_needed(num_computed)
            rows.append([NULL_BLOCK] * start + table.blocks[start:] if start > table.start else table.blocks)
        return rows

    def land(self, tables: SequenceTables, num_computed: int) -> None:
        """Give back what lies behind the windows of a sequence of which so many tokens are in the cache.

        No step in flight may have an earlier query than the one behind these tokens.
        """
        if num_computed < tables.release_at:
            return
        for group, table in zip(self.groups, tables.groups, strict=True):
            if (start := min(group.first_needed(num_computed), len(table.blocks))) > table.start:
                group.drop(table, start)
        self._note(tables)

    def store(self, tables: SequenceTables, hashes: Hashes, start: int, end: int) -> None:
        """Keep the blocks that are full with the tokens from `start` to before `end`, which are in the cache now.

        Nobody writes to them any more. `hashes` are those of all full blocks up to there.
        """
        for group, table in zip(self.groups, tables.groups, strict=True):
            group.store(table, hashes, start, end)

    def drop(self, tables: SequenceTables, ends: Sequence[int]) -> None:
        """Give back, in each group, the blocks at the places before these."""
        for group, table, end in zip(self.groups, tables.groups, ends, strict=True):
            group.drop(table, end)

    def release(self, tables: SequenceTables) -> None:
        """A sequence gives all of its blocks back. Nothing happens if it has none (any more)."""
        for group, table in zip(self.groups, tables.groups, strict=False):
            group.release(table)
        tables.groups, tables.num_slots, tables.release_at = (), 0, math.inf

    def forget(self, tables: SequenceTables, hashes: Hashes) -> None:
        """What a sequence has put into the cache may be wrong: it is not to be found any more."""
        for group, table in zip(self.groups, tables.groups, strict=False):
            group.forget(table, hashes)

    def _found(self, hashes: Hashes) -> int:
        """With how many of its leading tokens a prompt with these hashes finds all that its next query sees."""
        step = self._hit_tokens
        ends = range(step, len(hashes) * self.block_size + 1, step)
        usable = [group.usable(hashes, ends) for group in self.groups]
        if len(usable) == 1:
            return usable[0][-1] if usable[0] else 0
        return max(set(usable[0]).intersection(*usable[1:]), default=0)

    def _fits_prompt(self, hashes: Hashes, found: int, num_tokens: int, more: int = 0) -> bool:
        in_flight = self._prompt_tokens_in_flight
        return all(group.fits_prompt(hashes, found, num_tokens, in_flight, more) for group in self.groups)

    def _note(self, tables: SequenceTables) -> None:
        """What is looked at with every token."""
        tables.num_slots = min(
            len(table.blocks) * group.block_size for group, table in zip(self.groups, tables.groups, strict=True)
        )
        tables.release_at = min(
            group.release_at(table) for group, table in zip(self.groups, tables.groups, strict=True)
        )


def _group(spec: KVCacheSpec, num_blocks: int, smallest: int) -> CacheGroup:
    if spec.block_size % smallest:
        raise ValueError(f"blocks of {spec.block_size} tokens beside blocks of {smallest}: no multiple")
    stride = spec.block_size // smallest
    if spec.window is None:
        return CacheGroup(spec, PrefixCache(num_blocks), stride)
    return WindowGroup(spec, WindowPool(num_blocks - 1, first=1), stride)
