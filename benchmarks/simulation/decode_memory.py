"""Who holds blocks of a simulated decode worker: prompts reserve theirs, sequences grow, the newest make room.

As the real worker does it: a sequence that is preempted has its blocks in host memory, and comes back before anything
new is let in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from workers.kv_cache.block_pool import blocks_for
from workers.messages import WorkerRequest


@dataclass(eq=False)
class Sequence:
    """A request on a decode worker.

    Attributes:
        request: what was asked for.
        num_tokens: prompt and output so far.
        remaining: tokens that it will still generate.
        handed_over: the prefill worker has sent its cache.
        blocks: that it holds on the device.
        cached_tokens: of its prompt, that were here when it came.
    """

    request: WorkerRequest
    num_tokens: int
    remaining: int
    handed_over: bool = False
    blocks: int = 0
    cached_tokens: int = 0


class DecodeMemory:
    """Blocks of one worker and the sequences that want them.

    Attributes:
        num_free: blocks.
        num_preempted: times that a sequence had to leave, so far.

    Args:
        num_blocks: of the cache.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_free = num_blocks
        self.num_preempted = 0
        self._block_size = block_size
        self._waiting: dict[str, Sequence] = {}
        self._inside: dict[str, Sequence] = {}
        self._preempted: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._inside) + len(self._preempted)

    def all(self) -> list[Sequence]:
        """Every sequence."""
        return [*self._inside.values(), *self._waiting.values(), *self._preempted.values()]

    def find(self, attempt_id: str) -> Sequence | None:
        """A sequence by its name; None if it is over."""
        return self._inside.get(attempt_id) or self._waiting.get(attempt_id) or self._preempted.get(attempt_id)

    def enter(self, sequence: Sequence) -> None:
        """A request is here; its prompt's blocks are reserved when they are free, in the order of coming."""
        self._waiting[sequence.request.attempt_id] = sequence
        self._let_in()

    def leave(self, attempt_id: str) -> None:
        """A sequence is over, or unknown."""
        if (sequence := self.find(attempt_id)) is None:
            return
        for place in (self._inside, self._waiting, self._preempted):
            place.pop(attempt_id, None)
        self.num_free += sequence.blocks
        self._let_in()

    def next_batch(self, steps_at_once: int) -> tuple[list[Sequence], int, int]:
        """Who decodes next, for how many steps, and how many blocks had to be moved to or from the host before.

        Everybody in the batch holds the blocks for those steps.
        """
        moved = self._bring_back()
        batch = deque(sequence for sequence in self._inside.values() if sequence.handed_over)
        steps = min((steps_at_once, *(sequence.remaining for sequence in batch)))
        running: list[Sequence] = []
        while batch:
            sequence = batch[0]
            missing = self._needed(sequence, steps) - sequence.blocks
            if missing <= self.num_free:
                running.append(batch.popleft())
                sequence.blocks += missing
                self.num_free -= missing
            elif len(batch) + len(running) > 1:
                moved += self._preempt(batch.pop())
            else:
                break  # alone, and the reservations of prompts on their way hold the rest
        return running, steps, moved

    def _needed(self, sequence: Sequence, steps: int) -> int:
        return blocks_for(sequence.num_tokens + steps, self._block_size)

    def _preempt(self, sequence: Sequence) -> int:
        self.num_preempted += 1
        blocks, sequence.blocks = sequence.blocks, 0
        self.num_free += blocks
        name = sequence.request.attempt_id
        del self._inside[name]
        self._preempted[name] = sequence
        return blocks

    def _bring_back(self) -> int:
        """Those that were preempted, first to leave first to return, while they fit."""
        moved = 0
        for name, sequence in list(self._preempted.items()):
            blocks = self._needed(sequence, 1)
            if blocks > self.num_free:
                break
            sequence.blocks, moved = blocks, moved + blocks
            self.num_free -= blocks
            self._inside[name] = self._preempted.pop(name)
        if moved:
            self._let_in()
        return moved

    def _let_in(self) -> None:
        """Reserve the blocks of prompts that wait, while they fit and nobody is in host memory."""
        while self._waiting and not self._preempted:
            name, sequence = next(iter(self._waiting.items()))
            blocks = self._needed(sequence, 1)
            if blocks > self.num_free:
                return
            sequence.blocks = blocks
            self.num_free -= blocks
            self._inside[name] = self._waiting.pop(name)
