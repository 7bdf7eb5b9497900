"""The prefix cache of a simulated worker: as many hashes as it has blocks, the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from benchmarks.simulation.content import content_hashes
from workers.messages import CacheUpdate
from workers.token_ids import TokenIds


class PrefixStore:
    """What can be found by its content.

    Args:
        num_blocks: that are kept at most.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def find(self, token_ids: TokenIds) -> int:
        """How many of a prompt's first tokens are here, without the last; they are used now, the beginning last."""
        hashes = content_hashes(token_ids, self._block_size)[: (len(token_ids) - 1) // self._block_size]
        depth = next((i for i, content in enumerate(hashes) if content not in self._kept), len(hashes))
        for content in reversed(hashes[:depth]):
            self._kept.move_to_end(content)
        return depth * self._block_size

    def keep(self, token_ids: TokenIds) -> None:
        """A prompt's blocks are here."""
        for content in reversed(content_hashes(token_ids, self._block_size)):
            if content not in self._kept:
                self._note(content, self._stored, self._removed)
            self._kept[content] = None
            self._kept.move_to_end(content)
        while len(self._kept) > self._num_blocks:
            content, _ = self._kept.popitem(last=False)
            self._note(content, self._removed, self._stored)

    def take_update(self) -> CacheUpdate | None:
        """What has changed since the last one; None: nothing."""
        if not self._stored and not self._removed:
            return None
        update = CacheUpdate(tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return update

    @staticmethod
    def _note(content: bytes, now: dict[bytes, None], before: dict[bytes, None]) -> None:
        if content in before:
            del before[content]
        else:
            now[content] = None
