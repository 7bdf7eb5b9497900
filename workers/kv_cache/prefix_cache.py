"""KV blocks kept by content: a prompt takes over the blocks of those that began like it.

A full block is known by the hash of all tokens up to its end, which is all that its keys and values depend on within
one worker. Blocks that nobody uses any more stay until their memory is needed (the automatic prefix caching of vLLM,
arXiv:2309.06180, with a flat table instead of the radix tree of arXiv:2312.07104); `kept_blocks` says which go first.
Plain integers and bytes; knows neither tensors nor requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from workers.kv_cache.block_pool import BlockPool
from workers.kv_cache.kept_blocks import KeptBlocks
from workers.messages import CacheUpdate

MAX_HASHES_TOLD = 4096
"""Of one `CacheUpdate`, stored and removed each: 64 KiB; what is left goes with the next one."""


class PrefixCache:
    """The blocks of a worker's KV cache: free, in use by some prompts, or unused but kept for what is in them.

    A block is shared by every prompt that begins with its content, and is not written to again. Of equals the first
    block that was stored keeps its hash; a second one with the same content is its prompt's alone.

    Args:
        num_blocks: so many blocks are managed.
        first: the id of the first of them.
    """

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self._free = BlockPool(num_blocks, first)
        self._users = [0] * (first + num_blocks)  # prompts that use a block
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._kept = KeptBlocks(first + num_blocks, num_blocks)  # stored, without users
        self._stored: dict[bytes, None] = {}  # since the last update, in order; `_removed` likewise
        self._removed: dict[bytes, None] = {}

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._free.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and those that are only kept."""
        return self._num_available

    @property
    def _num_available(self) -> int:
        return self._free.num_free + len(self._kept)

    @property
    def num_stored(self) -> int:
        """Blocks that can be found by their content."""
        return len(self._hash_of)

    @property
    def held_by_owners(self) -> Mapping[str, int]:
        """Blocks that were taken for each owner, in use or kept."""
        return self._kept.held

    @property
    def used_blocks(self) -> frozenset[int]:
        """Blocks in use by some prompts."""
        return frozenset(block for block, users in enumerate(self._users) if users)

    @property
    def stored_blocks(self) -> Mapping[bytes, int]:
        """Blocks that can be found by their content, by its hash; the one stored last comes last."""
        return MappingProxyType(self._block_of)

    def num_users(self, block: int) -> int:
        """Prompts that use a block; none of one that is not managed here."""
        return self._users[block] if 0 <= block < len(self._users) else 0

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning that is here."""
        found: list[int] = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def fits(self, hashes: Sequence[bytes], count: int) -> bool:
        """Whether `allocate` would succeed."""
        if count <= self.num_free:
            return True
        found = self.find(hashes)
        return count - len(found) <= self.num_free - sum(map(self.share_cost, found))

    def allocate(self, hashes: Sequence[bytes], count: int, owner: str = "") -> tuple[list[int], int]:
        """Take the blocks of a prompt: those that hold its beginning, and others for the rest.

        Args:
            hashes: of its leading blocks, as far as they may be taken from the cache.
            count: all blocks that it needs, at least as many as hashes.
            owner: whose it is.

        Returns:
            The blocks in order, and how many of them hold the prompt's content already.

        Raises:
            ValueError: there are not enough; ask `fits` first.
        """
        if not self.fits(hashes, count):
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        found = self.find(hashes)
        self.share(found)
        self.repeat(found, owner)
        return found + self.take(count - len(found), owner), len(found)

    def repeat(self, blocks: Sequence[int], owner: str) -> None:
        """A prompt of this owner begins with blocks that were found: they are kept longer than what nobody repeats."""
        self._kept.repeat(blocks, owner)

    def share_cost(self, block: int) -> int:
        """How many free blocks it takes to share this one, which was found: 1 if nobody uses it, else 0."""
        return int(not self._users[block])

    def find_each(self, hashes: Sequence[bytes]) -> list[int | None]:
        """For each of these hashes the block that has it, if one is here."""
        return [self._block_of.get(content) for content in hashes]

    def share(self, blocks: Sequence[int]) -> None:
        """Use blocks that were found, beside those who use them already."""
        for block in blocks:
            if not self._users[block]:
                self._kept.use(block)
            self._users[block] += 1

    def take(self, count: int, owner: str = "") -> list[int]:
        """Use so many other blocks, which hold nothing that can be found, and are this owner's until they are free.

        Raises:
            ValueError: there are not enough.
        """
        if count > self._num_available:
            raise ValueError(f"{count} blocks asked for, {self._num_available} are free")
        account = self._kept.charge(count, owner)
        if evicted := self._kept.evict(count - self._free.num_free):
            for block in evicted:
                self._remove(block)
            self._set_free(evicted)
        blocks: list[int] = []
        for run in self._free.allocate_runs(count):
            self._users[run.start : run.stop] = [1] * len(run)
            blocks.extend(run)
        self._kept.take(blocks, account)
        return blocks

    def store(self, block: int, content: bytes) -> None:
        """A block in use holds this content completely, and nobody writes to it any more.

        Raises:
            ValueError: the block is not in use.
        """
        if not self.num_users(block):
            raise ValueError(f"block {block} is not in use")
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content], self._hash_of[block] = block, content
            if content in self._removed:
                del self._removed[content]
            else:
                self._stored[content] = None

    def release(self, blocks: Sequence[int]) -> None:
        """A prompt gives its blocks back, in its order. What it began with is kept longer than what followed.

        Raises:
            ValueError: a block that is not in use.
        """
        free = []
        try:
            for block in reversed(blocks):
                if not self.num_users(block):
                    raise ValueError(f"block {block} is not in use")
                self._users[block] -= 1
                if self._users[block]:
                    continue
                if block in self._hash_of:
                    self._kept.keep(block)
                else:
                    free.append(block)
        finally:
            self._set_free(free)
            self._kept.bound()

    def forget(self, blocks: Sequence[int]) -> None:
        """What is in these blocks, all in use, is not to be found any more; who uses them goes on."""
        for block in blocks:
            if block in self._hash_of:
                self._remove(block)

    def forget_content(self, hashes: Iterable[bytes]) -> None:
        """What has these hashes is not to be found any more, whoever uses it."""
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                continue
            self._remove(block)
            if not self._users[block]:
                self._kept.use(block)
                self._set_free((block,))

    def take_update(self) -> CacheUpdate | None:
        """What can be found now and could not at the last update, and the other way round; None: nothing."""
        if not self._stored and not self._removed:
            return None
        stored = tuple(islice(self._stored, MAX_HASHES_TOLD))
        removed = tuple(islice(self._removed, MAX_HASHES_TOLD))
        for content in stored:
            del self._stored[content]
        for content in removed:
            del self._removed[content]
        return CacheUpdate(stored, removed)

    def _set_free(self, blocks: Sequence[int]) -> None:
        self._free.free(blocks)
        self._kept.give_back(blocks)

    def _remove(self, block: int) -> None:
        self._kept.forget(block)
        content = self._hash_of.pop(block)
        del self._block_of[content]
        if content in self._stored:
            del self._stored[content]
        else:
            self._removed[content] = None
