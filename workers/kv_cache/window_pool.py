"""The blocks of a sliding group: some are promised to prompts under way, which take and give back as they move on.

A prompt under way was promised the most blocks that it will hold at once, and takes them chunk by chunk. What is free
for others is what is left when every promise is kept. A block that others use, too, counts for a promise only as long
as all of its users were promised blocks: as soon as somebody else uses it, giving it back would not make it free.

With F blocks free or only kept, promises of G blocks together and P blocks whose users all were promised blocks, F - G
+ P are for others. Each of the P has a user with a promise that it fills, so a prompt that holds fewer than it was
promised finds P < G, hence F > 0 as long as F - G + P is not negative, which nothing that `num_free` allows makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.kv_cache.prefix_cache import PrefixCache


class WindowPool(PrefixCache):
    """See the module. `promised` says whether it is a prompt with a promise that takes or gives back."""

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        super().__init__(num_blocks, first)
        self._promises = 0
        self._promised_users: dict[int, int] = {}
        self._covered = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody has and nobody was promised."""
        return super().num_free - self._promises + self._covered

    def promise(self, count: int) -> None:
        """Promise so many blocks.

        Raises:
            ValueError: more than are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        self._promises += count

    def withdraw(self, count: int, blocks: Sequence[int]) -> None:
        """End a promise; whoever had it goes on with the blocks that it holds."""
        self._promises -= count
        self._count(blocks, lambda: self._unpromise(blocks))

    def share_cost(self, block: int) -> int:
        """How many free blocks it takes to share this one without a promise: 0 or 1."""
        users = self._users[block]
        return int(users == self._promised_users.get(block, 0))

    def share(self, blocks: Sequence[int], *, promised: bool = False) -> None:
        """See `PrefixCache.share`."""

        def work() -> None:
            super(WindowPool, self).share(blocks)
            if promised:
                self._promise_users(blocks)

        self._count(blocks, work)

    def take(self, count: int, owner: str = "", *, promised: bool = False) -> list[int]:
        """See `PrefixCache.take`."""
        own = super().take(count, owner)
        if promised:
            self._promise_users(own)
            self._covered += len(own)
        return own

    def release(self, blocks: Sequence[int], *, promised: bool = False) -> None:
        """See `PrefixCache.release`."""

        def work() -> None:
            super(WindowPool, self).release(blocks)
            if promised:
                self._unpromise(blocks)

        self._count(blocks, work)

    def _promise_users(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._promised_users[block] = self._promised_users.get(block, 0) + 1

    def _unpromise(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._promised_users[block] -= 1
            if not self._promised_users[block]:
                del self._promised_users[block]

    def _count(self, blocks: Sequence[int], work: Callable[[], None]) -> None:
        """Do something that changes the users of these blocks, and keep the number of covered ones."""
        self._covered -= sum(map(self._is_covered, blocks))
        try:
            work()
        finally:
            self._covered += sum(map(self._is_covered, blocks))

    def _is_covered(self, block: int) -> bool:
        users = self._users[block]
        return users > 0 and users == self._promised_users.get(block, 0)
