"""Blocks that nobody uses and that are kept for what is in them: which of them goes when memory is needed.

Three kinds, which go in this order. What no later prompt has begun with; what prompts of its own owner have begun with;
what those of several owners have (a segmented LRU: Karedla, Love and Wherry, "Caching Strategies to Improve Disk System
Performance", Computer 27(3), 1994). Of the first two kinds the owner who has most blocks, in use or kept, gives first
(max-min fairness), each owner's least recently used ones first. So prompts which nobody repeats, however long and many,
take none of what others share, and who repeats its own takes no more from another than makes the two equal.
Plain integers and texts; knows neither tensors nor requests.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from types import MappingProxyType

PROTECTED_SHARE = 0.75
"""Of all blocks, those at most that go last; what was used longest ago of more is as if no prompt had repeated it."""
OWNER_SHARE = 0.5
"""Of these, those at most of one owner that it alone has repeated, where there are several owners."""
MAX_OWNERS = 64
"""That are told apart; those who come when there are so many count as one."""

_OTHERS = "\0others"


class KeptBlocks:
    """Who has how many blocks, and which of them go first.

    Args:
        num_ids: ids of blocks are less than this.
        num_blocks: all blocks.
    """

    def __init__(self, num_ids: int, num_blocks: int) -> None:
        self._owner_of = [""] * num_ids
        self._held: Counter[str] = Counter()  # blocks of each owner, in use or kept
        self._repeated: set[int] = set()  # that a prompt of their owner has begun with
        self._shared: set[int] = set()  # that one of another owner has
        self._once, self._own, self._common = _ByOwner(), _ByOwner(), _ByOwner()
        self._most_protected = int(num_blocks * PROTECTED_SHARE)

    def __len__(self) -> int:
        return len(self._once) + len(self._own) + len(self._common)

    @property
    def held(self) -> Mapping[str, int]:
        """Blocks of each owner, in use or kept."""
        return MappingProxyType(self._held)

    def charge(self, count: int, owner: str) -> str:
        """An owner will take so many blocks: what has to go for them is found with that in mind.

        Returns:
            As whom it goes.
        """
        account = self._account(owner)
        if count:
            self._held[account] += count
        return account

    def take(self, blocks: Sequence[int], account: str) -> None:
        """Blocks that were free are theirs who were charged for them, until they are free again."""
        for block in blocks:
            self._owner_of[block] = account

    def give_back(self, blocks: Sequence[int]) -> None:
        """Blocks are free again, with nothing in them."""
        for owner, count in Counter(map(self._owner_of.__getitem__, blocks)).items():
            self._held[owner] -= count
            if not self._held[owner]:
                del self._held[owner]

    def repeat(self, blocks: Sequence[int], owner: str) -> None:
        """A prompt of this owner begins with these blocks."""
        account = self._account(owner)
        for block in blocks:
            if block in self._shared:
                continue
            if self._owner_of[block] == account:
                self._repeated.add(block)
            else:
                self._repeated.discard(block)
                self._shared.add(block)

    def keep(self, block: int) -> None:
        """Nobody uses a block any more; it is the most recently used of its kind."""
        kind, owner = self._place_of(block)
        kind.add(owner, block)

    def use(self, block: int) -> None:
        """Somebody uses a block that was kept."""
        kind, owner = self._place_of(block)
        kind.remove(owner, block)

    def forget(self, block: int) -> None:
        """What is in a block is not to be found any more."""
        if block in self._repeated:
            self._repeated.discard(block)
        elif block in self._shared:
            self._shared.discard(block)

    def evict(self, count: int) -> list[int]:
        """Of the blocks that are kept so many, at most, that are to go; they are kept no more."""
        gone: list[int] = []
        for kind in (self._once, self._own, self._common):
            gone += kind.take_from_largest(count - len(gone), self._held)
        return gone

    def bound(self) -> None:
        """Let no more go last than may: what was used longest ago is as if no prompt had repeated it."""
        if len(self._held) > 1:
            for owner in self._own.owners_above(int(self._most_protected * OWNER_SHARE)):
                self._demote([self._own.pop(owner)], self._repeated)
        if (over := len(self._own) + len(self._common) - self._most_protected) > 0:
            self._demote(self._own.take_from_largest(over, self._own.sizes()), self._repeated)
        while len(self._common) > self._most_protected:
            self._demote([self._common.pop("")], self._shared)

    def _place_of(self, block: int) -> tuple[_ByOwner, str]:
        if block in self._repeated:
            return self._own, self._owner_of[block]
        return (self._common, "") if block in self._shared else (self._once, self._owner_of[block])

    def _demote(self, blocks: Sequence[int], marks: set[int]) -> None:
        for block in blocks:
            marks.discard(block)
            self._once.add(self._owner_of[block], block)

    def _account(self, owner: str) -> str:
        if owner in self._held or len(self._held) < MAX_OWNERS:
            return owner
        return _OTHERS


class _ByOwner:
    """Blocks of one kind, each owner's with the least recently used first."""

    def __init__(self) -> None:
        self._lines: dict[str, OrderedDict[int, None]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def sizes(self) -> dict[str, int]:
        return {owner: len(line) for owner, line in self._lines.items()}

    def owners_above(self, most: int) -> list[str]:
        """Each as often as it has more blocks."""
        return [owner for owner, line in self._lines.items() for _ in range(len(line) - most)]

    def add(self, owner: str, block: int) -> None:
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = OrderedDict()
        line[block] = None
        self._size += 1

    def remove(self, owner: str, block: int) -> None:
        line = self._lines[owner]
        del line[block]
        self._size -= 1
        if not line:
            del self._lines[owner]

    def pop(self, owner: str) -> int:
        return self._pop(owner, 1)[0]

    def _pop(self, owner: str, count: int) -> list[int]:
        """The first ones of an owner's, so many at most."""
        line = self._lines[owner]
        taken = [line.popitem(last=False)[0] for _ in range(min(count, len(line)))]
        self._size -= len(taken)
        if not line:
            del self._lines[owner]
        return taken

    def take_from_largest(self, count: int, sizes: Mapping[str, int]) -> list[int]:
        """So many blocks at most, each from whoever is the largest when it is taken."""
        if count <= 0 or not self._lines:
            return []
        taken: list[int] = []
        largest = [(-sizes.get(owner, 0), owner) for owner in self._lines]
        heapify(largest)
        while len(taken) < count and largest:
            size, owner = largest[0]
            ahead = min(largest[1:3], default=(0, ""))[0] - size  # of the next one
            own = self._pop(owner, min(max(0, ahead) + 1, count - len(taken)))
            taken += own
            if owner in self._lines:
                heapreplace(largest, (size + len(own), owner))
            else:
                heappop(largest)
        return taken
