"""How the blocks of a worker's KV cache are shared out among its cache groups. Plain integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention.kv_cache import KVCacheSpec
from kv_transfer.layout import primary_group
from workers.config import WorkerConfig
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.windows import most_sequence_blocks


class CacheSplit:
    """A cache is as large as its primary group, which the others follow.

    A group that keeps all tokens holds as many as the primary group does. One with a window gets what a full batch
    holds at once, and no room for more tokens than the others have.

    Attributes:
        primary: the index of the primary group.
        most_blocks: of each group, the most that a sequence holds at once.

    Args:
        groups: of the cache.
        most_blocks: see above.
        max_num_seqs: sequences of a full batch.
    """

    def __init__(self, groups: Sequence[KVCacheSpec], most_blocks: Sequence[int], max_num_seqs: int) -> None:
        self.primary = primary_group([spec.window for spec in groups])
        self.most_blocks = tuple(most_blocks)
        self._groups = tuple(groups)
        self._max_num_seqs = max_num_seqs

    def counts(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks of each group's tensor, given those of the primary group that sequences get."""
        num_tokens = num_blocks * self._groups[self.primary].block_size
        counts = []
        for i, (spec, most) in enumerate(zip(self._groups, self.most_blocks, strict=True)):
            same = blocks_for(num_tokens, spec.block_size)
            if spec.window is None:
                counts.append(same)
            else:  # and one that stands for those that were given back
                counts.append(1 + (num_blocks if i == self.primary else min(same, most * self._max_num_seqs)))
        return tuple(counts)

    def num_bytes(self, num_blocks: int) -> int:
        """Of the whole cache, given the blocks of the primary group."""
        counts = self.counts(num_blocks)
        return sum(count * spec.bytes_per_block for count, spec in zip(counts, self._groups, strict=True))

    def blocks_that_fit(self, num_bytes: int) -> int:
        """The most blocks of the primary group with which the whole cache takes no more than so many bytes, or 0."""
        low, high = 0, max(0, num_bytes) // self._groups[self.primary].bytes_per_block + 1
        while high - low > 1:  # `low` fits, or is 0; `high` does not
            middle = (low + high) // 2
            low, high = (middle, high) if self.num_bytes(middle) <= num_bytes else (low, middle)
        return low


def most_blocks(config: WorkerConfig, spec: KVCacheSpec, max_model_len: int) -> int:
    """The most blocks of a group that a sequence holds at once on a worker."""
    steps = 1 + default_steps_ahead(config.device)
    computes = config.role == "prefill" or config.local_prefill
    in_flight = steps * config.max_num_batched_tokens if computes else steps
    return most_sequence_blocks(max_model_len, spec.window, in_flight, spec.block_size)


def default_steps_ahead(device: torch.device | str) -> int:
    """How many steps are in flight while the next is launched: on a CPU launching a step computes it."""
    return int(torch.device(device).type == "cuda")
