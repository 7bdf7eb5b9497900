"""What a decode worker keeps of its sequences' blocks, by content: for prompts that begin alike, and for the next turn.

A prompt's full blocks are kept once its handoff is complete, and a full block of generated tokens as soon as the step
that filled it has landed. Steps write behind a sequence's last token only, in flight or one too many, so nobody writes
to a kept block again. What failed or is quarantined was never entered.
"""

from __future__ import annotations

from workers.kv_cache.manager import KVCacheManager
from workers.scheduling.sequence import Sequence


class SequenceBlocks:
    """Takes blocks for sequences, enters what they hold, and gives back what no query will see.

    Args:
        cache: the worker's.
        enabled: whether anything is kept.
    """

    def __init__(self, cache: KVCacheManager, *, enabled: bool) -> None:
        self._cache = cache
        self._block_size = cache.block_size
        self._enabled = enabled

    def begin(self, sequence: Sequence) -> None:
        """A request has come: what its prompt's blocks hold."""
        if self._enabled:
            sequence.content = sequence.request.hashes_for(self._block_size)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for its prompt and the next token of each of its samples now."""
        num_tokens = len(sequence.request.prompt_token_ids)
        return self._cache.fits(sequence.hashes, num_tokens, num_tokens + 1, sequence.num_samples)

    def take(self, sequence: Sequence) -> None:
        """Take the blocks of its prompt that decode sees: as many of the first as are here, and others for the rest."""
        num_tokens = len(sequence.request.prompt_token_ids)
        owner = sequence.request.cache_owner
        sequence.tables, sequence.num_cached_blocks = self._cache.admit(sequence.hashes, num_tokens, num_tokens, owner)

    def received(self, sequence: Sequence) -> None:
        """The blocks that its prompt lacked have arrived, whole."""
        if sequence.content is None:
            return
        end = len(sequence.hashes) * self._block_size
        groups, tables = self._cache.groups, sequence.tables.groups
        for group, table, first in zip(groups, tables, self.granted_from(sequence), strict=True):
            group.store(table, sequence.hashes, first * group.block_size, end)

    def grown(self, sequence: Sequence) -> None:
        """It has one more token. The token itself is not in the cache yet; all before it are."""
        num_computed, hashes = sequence.num_tokens - 1, sequence.content
        if num_computed % self._block_size == 0 and hashes is not None:
            known = len(hashes) * self._block_size
            hashes.extend(sequence.token_ids(known, num_computed))
            self._cache.store(sequence.tables, hashes, known, num_computed)
        if num_computed >= sequence.tables.release_at:
            self._cache.land(sequence.tables, num_computed)

    def give_back_cached(self, sequence: Sequence) -> None:
        """Nobody wants its handoff any more: what was here before was not granted to anybody, and goes back at once."""
        if sequence.tables.groups:
            self._cache.drop(sequence.tables, self.granted_from(sequence))
        sequence.num_cached_blocks = ()

    def granted_from(self, sequence: Sequence) -> list[int]:
        """For each cache group the place of the first of its prompt's blocks that was not here when it was admitted."""
        num_tokens = len(sequence.request.prompt_token_ids)
        cached = sequence.num_cached_blocks or (0,) * len(self._cache.groups)
        return [group.first_needed(num_tokens) + count for group, count in zip(self._cache.groups, cached, strict=True)]

    def cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of its prompt whose cache was here when it was admitted."""
        cached = sequence.num_cached_blocks
        return cached[self._cache.primary] * self._cache.groups[self._cache.primary].block_size if cached else 0

    def forget(self, sequence: Sequence) -> None:
        """Its logits are not valid: what is in its blocks may be wrong itself, and is not to be found any more."""
        self._cache.forget(sequence.tables, sequence.hashes)
        sequence.content = None
