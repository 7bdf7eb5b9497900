"""Which workers hold the beginning of a prompt, from what they say of their prefix caches.

A table from the hash of a block to the workers that hold it, as the bits of a whole number: a prompt is followed
through it block by block for all workers at once. Blocks that are stored together share one number, so that along most
of a prompt nothing changes. The table holds no more than the workers do. What it says may be a moment old, which makes
a prediction worse and nothing wrong: a worker looks for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from workers.block_hashes import BlockHashes, PromptHashes
from workers.token_ids import TokenIds, as_token_ids

_FEW = 8
"""Workers up to which it is quicker to look at each alone."""


class PromptPrefix:
    """A prompt as prefix caches are asked for it: its blocks' hashes, for each block size.

    They are made when they are first asked for, and go to the workers with the request. Of a long prompt that takes a
    while: `prepare` it on another thread before the router sees it.

    Args:
        token_ids: the prompt.
        salt: prompts of unlike salts share no hash.
    """

    def __init__(self, token_ids: Sequence[int] | TokenIds, salt: bytes = b"") -> None:
        self._token_ids = as_token_ids(token_ids)
        self._salt = salt
        self._chains: dict[int, BlockHashes] = {}
        self._hashes: dict[int, tuple[bytes, ...]] = {}
        self._carried: dict[int, PromptHashes] = {}

    def prepare(self, block_sizes: Iterable[int]) -> None:
        """Make the hashes for workers of these block sizes."""
        for block_size in block_sizes:
            self.hashes(block_size)

    def followed_by(self, output: TokenIds) -> PromptPrefix:
        """The prompt with what was generated after it, whose hashes go on where these ended."""
        longer = PromptPrefix(np.concatenate((self._token_ids, output)), self._salt)
        longer._chains = self._chains
        return longer

    def hashes(self, block_size: int) -> tuple[bytes, ...]:
        """Of the full blocks that a worker need not compute; the one with the last token is always computed."""
        if (known := self._hashes.get(block_size)) is None:
            reusable = (len(self._token_ids) - 1) // block_size
            if (chain := self._chains.get(block_size)) is None:
                chain = self._chains[block_size] = BlockHashes(block_size, self._salt)
            chain.extend(self._token_ids[len(chain) * block_size :])
            known = self._hashes[block_size] = tuple(chain[:reusable])
        return known

    def carried(self, block_size: int) -> PromptHashes | None:
        """Of all full blocks, for a worker of this block size; None: they would have to be made from the beginning."""
        if block_size not in self._chains:
            return None
        self.hashes(block_size)  # of an output, they go on from the prompt's
        if (known := self._carried.get(block_size)) is None:
            digests = self._chains[block_size][: len(self._token_ids) // block_size].digests
            known = self._carried[block_size] = PromptHashes(block_size, digests)
        return known


class PrefixIndex:
    """The prefix caches of all workers, as they reported them. A worker goes by its slot, a small number."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._held: dict[str, set[bytes]] = {}
        self._holders: dict[bytes, int] = {}  # bit s: the worker of slot s; of neighbours often one object
        self._sizes: dict[int, int] = {}  # block size to the workers that have it
        self._num_slots = 0  # one more than the highest

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def block_sizes(self) -> Collection[int]:
        """Of the workers that are here."""
        return self._sizes.keys()

    def add(self, engine_id: str, block_size: int) -> int:
        """A worker is here; its cache is empty. Returns its slot: the lowest that is not taken."""
        taken = set(self._slots.values())
        slot = next(slot for slot in itertools.count() if slot not in taken)
        self._slots[engine_id], self._held[engine_id] = slot, set()
        self._sizes[block_size] = self._sizes.get(block_size, 0) | 1 << slot
        self._num_slots = max(self._num_slots, slot + 1)
        return slot

    def remove(self, engine_id: str) -> None:
        """A worker is gone, and its cache with it."""
        self.update(engine_id, (), tuple(self._held[engine_id]))
        del self._held[engine_id]
        bit = 1 << self._slots.pop(engine_id)
        self._num_slots = max(self._slots.values(), default=-1) + 1
        self._sizes = {size: mask & ~bit for size, mask in self._sizes.items() if mask & ~bit}

    def update(self, engine_id: str, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """A worker's cache has changed. What a worker that is not here says is not listened to."""
        if engine_id not in self._slots:
            return
        bit, held, holders = 1 << self._slots[engine_id], self._held[engine_id], self._holders
        before, now = bit, 0
        for content in removed:
            if content in held:
                held.remove(content)
                if (those := holders[content]) is not before:
                    before, now = those, those ^ bit
                if now:
                    holders[content] = now
                else:
                    del holders[content]
        before, now = 0, bit
        for content in stored:
            held.add(content)
            if (those := holders.get(content, 0)) is not before:
                before, now = those, those | bit
            holders[content] = now

    def cached_tokens(self, prefix: PromptPrefix) -> npt.NDArray[np.float64]:
        """How many of the prompt's first tokens each worker holds, by slot."""
        cached = np.zeros(self._num_slots)
        if self._holders:
            for block_size, workers in self._sizes.items():
                self._follow(prefix.hashes(block_size), workers, block_size, cached)
        return cached

    def _follow(self, hashes: Sequence[bytes], workers: int, block_size: int, cached: npt.NDArray[np.float64]) -> None:
        """Go along a prompt's blocks for as long as one of these workers holds all of them; note who holds how many."""
        tokens = 0
        before: int | None = -1
        for holders in map(self._holders.get, hashes):
            if holders is not before:
                before = holders
                still = workers & holders if holders else 0
                if still != workers:
                    if tokens:
                        _fill(cached, workers ^ still, tokens)
                    if not still:
                        return
                    workers = still
            tokens += block_size
        _fill(cached, workers, tokens)


def _fill(values: npt.NDArray[np.float64], bits: int, value: int) -> None:
    """Set the values whose bits are set: one by one where they are few."""
    if bits.bit_count() > _FEW:
        octets = np.frombuffer(bits.to_bytes(len(values) // 8 + 1, "little"), dtype=np.uint8)
        values[np.unpackbits(octets, count=len(values), bitorder="little").view(np.bool_)] = value
        return
    while bits:
        highest = bits.bit_length() - 1
        values[highest] = value
        bits ^= 1 << highest
