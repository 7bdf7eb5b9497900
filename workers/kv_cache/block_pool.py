"""Which KV blocks are free. Plain integers; knows neither tensors nor requests.

Free blocks are kept as extents (runs of neighbours), and what is asked for together lies together where it can: a
prompt's blocks in one layer are then one piece of memory, and its handoff is one descriptor a layer.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import chain


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // block_size)


class BlockPool:
    """Hands out block ids and takes them back.

    Best fit: the smallest extent that holds all that is asked for, else the largest ones until it suffices. Single
    blocks, with which sequences grow, are taken from the upper end of an extent and everything else from the lower
    one, so that the two do not fragment each other. Finding an extent takes O(log e) for e extents, removing or adding
    one moves up to e entries of a list.

    Args:
        num_blocks: so many blocks are managed.
        first: the id of the first of them.
    """

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self.num_blocks = num_blocks
        self._used = bytearray(first + num_blocks)  # 1 for each block that is handed out
        self._num_free = num_blocks
        self._length: dict[int, int] = {}  # of the extent that starts here
        self._start: dict[int, int] = {}  # of the extent that ends before this block
        self._by_size: list[tuple[int, int]] = []  # (length, start), sorted
        if num_blocks:
            self._add(first, num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return self._num_free

    @property
    def largest_extent(self) -> int:
        """The most blocks that `allocate` can hand out as one run."""
        return self._by_size[-1][0] if self._by_size else 0

    def allocate(self, count: int) -> list[int]:
        """Take blocks: one ascending run if there is one that long, else few of them.

        Raises:
            ValueError: more than there are; ask `num_free` first.
        """
        return list(chain.from_iterable(self.allocate_runs(count)))

    def allocate_runs(self, count: int) -> list[range]:
        """The same, run by run.

        Raises:
            ValueError: more than there are; ask `num_free` first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        runs: list[range] = []
        missing = count
        while missing:
            run = self._take(missing)
            self._used[run.start : run.stop] = b"\1" * len(run)
            runs.append(run)
            missing -= len(run)
        self._num_free -= count
        return runs

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: a block that is not in use; giving a block back twice would hand it to two sequences.
        """
        given = list(blocks)
        returned: list[int] = []
        try:
            for block in given:
                if not (0 <= block < len(self._used) and self._used[block]):
                    raise ValueError(f"block {block} is not in use")
                self._used[block] = 0
                returned.append(block)
        finally:
            self._num_free += len(returned)
            for start, length in _runs(sorted(returned)):
                self._join(start, length)

    def _take(self, wanted: int) -> range:
        """Up to `wanted` blocks of one extent."""
        place = min(bisect_left(self._by_size, (wanted, 0)), len(self._by_size) - 1)
        length, start = self._by_size[place]
        self._remove(start)
        if length <= wanted:
            return range(start, start + length)
        if wanted == 1:
            self._add(start, length - 1)
            return range(start + length - 1, start + length)
        self._add(start + wanted, length - wanted)
        return range(start, start + wanted)

    def _join(self, start: int, length: int) -> None:
        """Blocks are free again: one extent with their neighbours."""
        if (before := self._start.get(start)) is not None:
            length += self._remove(before)
            start = before
        if start + length in self._length:
            length += self._remove(start + length)
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        insort(self._by_size, (length, start))

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length]
        del self._by_size[bisect_left(self._by_size, (length, start))]
        return length


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending block ids as (start, length) of their runs."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield blocks[first], i - first
            first = i
