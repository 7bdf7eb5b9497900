"""What a decode worker keeps of its sequences' blocks, by content: for prompts that begin alike, and for the next turn.

A prompt's full blocks are kept once its handoff is complete, and a full block of generated tokens as soon as the step
that filled it has landed. Steps write behind a sequence's last token only, in flight or one too many, so nobody writes
to a kept block again. What failed or is quarantined was never entered.
"""

from __future__ import annotations

from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.prefix_cache import PrefixCache
from workers.scheduling.sequence import Sequence


class SequenceBlocks:
    """Takes blocks for sequences, and enters what they hold.

    Args:
        blocks: of the worker's cache.
        block_size: tokens in a block.
        enabled: whether anything is kept.
    """

    def __init__(self, blocks: PrefixCache, block_size: int, *, enabled: bool) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._enabled = enabled

    def begin(self, sequence: Sequence) -> None:
        """A request has come: what its prompt's blocks hold."""
        if self._enabled:
            sequence.content = sequence.request.hashes_for(self._block_size)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for its prompt and its next token now."""
        count = blocks_for(len(sequence.request.prompt_token_ids) + 1, self._block_size)
        return self._blocks.fits(sequence.hashes, count)

    def take(self, sequence: Sequence) -> None:
        """Take the blocks of its prompt: as many leading ones as are here, and others for the rest."""
        count = blocks_for(len(sequence.request.prompt_token_ids), self._block_size)
        sequence.blocks, sequence.num_cached_blocks = self._blocks.allocate(sequence.hashes, count)

    def received(self, sequence: Sequence) -> None:
        """The blocks that its prompt lacked have arrived, whole."""
        hashes = sequence.hashes
        for place in range(sequence.num_cached_blocks, len(hashes)):
            self._blocks.store(sequence.blocks[place], hashes[place])

    def grown(self, sequence: Sequence) -> None:
        """It has one more token. The token itself is not in the cache yet; all before it are."""
        if sequence.content is None:
            return
        hashes, size = sequence.content, self._block_size
        for place in range(len(hashes), (sequence.num_tokens - 1) // size):
            hashes.extend(sequence.token_ids(place * size, (place + 1) * size))
            self._blocks.store(sequence.blocks[place], hashes[place])

    def give_back_cached(self, sequence: Sequence) -> None:
        """Nobody wants its handoff any more: what was here before was not granted to anybody, and goes back at once."""
        cached = sequence.blocks[: sequence.num_cached_blocks]
        del sequence.blocks[: sequence.num_cached_blocks]
        sequence.num_cached_blocks = 0
        self._blocks.release(cached)

    def forget(self, sequence: Sequence) -> None:
        """Its logits are not valid: what is in its blocks may be wrong itself, and is not to be found any more."""
        sequence.content = None
        self._blocks.forget(sequence.blocks)
