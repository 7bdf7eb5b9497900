"""The sequences of each request on a decode worker: one until its prompt is whole, then one for each sample.

A request is admitted, and its prompt handed over or computed, as one sequence. When that is whole its samples part:
each goes on from the same full blocks, which are shared by count because nobody writes to them again, and has a copy of
the block that the prompt leaves half full. From then on they are sequences like all others: they grow, end and make
room each for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Many

from workers.kv_cache.manager import KVCacheManager
from workers.messages import FinishReason
from workers.sampling.state import finish_reason
from workers.scheduling.decode_scheduler import BlockStore, DecodeBatch
from workers.scheduling.sequence import Sequence


class RequestSequences:
    """The sequences under way, by attempt."""

    def __init__(self) -> None:
        self._of: dict[str, list[Sequence]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def add(self, sequence: Sequence) -> None:
        """One more."""
        self._of.setdefault(sequence.request.attempt_id, []).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """One has ended."""
        attempt_id = sequence.request.attempt_id
        left = self._of[attempt_id]
        left.remove(sequence)
        if not left:
            del self._of[attempt_id]

    def pop(self, attempt_id: str) -> list[Sequence]:
        """All of an attempt, which are not under way any more; none, if it is not known."""
        return self._of.pop(attempt_id, [])

    def of(self, attempt_id: str) -> tuple[Sequence, ...]:
        """All of an attempt; none, if it is not known."""
        return tuple(self._of.get(attempt_id, ()))

    def overdue(self, now: float) -> Iterator[list[Sequence]]:
        """Those of the attempts whose deadline has passed; they are not under way any more."""
        for attempt_id in [name for name, sequences in self._of.items() if sequences[0].deadline <= now]:
            yield self._of.pop(attempt_id)


class Parting:
    """Lets a request's samples go on, each from the end of the prompt.

    Args:
        cache: the worker's.
        store: copies blocks.
        batch: where they go on.
    """

    def __init__(self, cache: KVCacheManager, store: BlockStore, batch: DecodeBatch) -> None:
        self._cache = cache
        self._store = store
        self._batch = batch

    def begin(
        self, sequence: Sequence, first_tokens: Many[int], now: float
    ) -> tuple[list[Sequence], list[FinishReason | None]]:
        """The prompt is whole and the first tokens known: decode, as far as these do not end a sample.

        Args:
            sequence: with the prompt's blocks, which belong from now on to those that go on.
            first_tokens: one for each sample.
            now: by the worker's clock.

        Returns:
            The sequences that go on, and for each sample why it ends with its first token.
        """
        sequence.received = now
        reasons = []
        for state, token in zip(sequence.states, first_tokens, strict=True):
            state.output_token_ids.append(token)
            reasons.append(finish_reason(state))
        others = [
            self._sample(sequence, index)
            for index in range(1, sequence.num_samples)
            if reasons[index] is None and index not in sequence.unwanted
        ]
        sequence.others = ()
        self._part(sequence, others)
        going_on = others
        if reasons[0] is None and 0 not in sequence.unwanted:
            self._batch.add(sequence)
            going_on = [sequence, *others]
        else:
            self._cache.release(sequence.tables)
        for other in others:
            if other.host_copy is None:
                self._batch.add(other)
            else:
                self._batch.add_waiting(other)
            other.tells_decode = other is going_on[0]
        return going_on, reasons

    @staticmethod
    def _sample(sequence: Sequence, index: int) -> Sequence:
        return Sequence(
            sequence.request,
            sequence.others[index - 1],
            sequence.deadline,
            sequence.arrived,
            content=None if sequence.content is None else sequence.content.copy(),
            num_cached_blocks=sequence.num_cached_blocks,
            received=sequence.received,
            index=index,
        )

    def _part(self, sequence: Sequence, others: Many[Sequence]) -> None:
        """Give the others their tables; those for whom there is no room share a copy in host memory."""
        num_tokens = len(sequence.request.prompt_token_ids)
        copies: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        host_copy = None
        for other in others:
            if host_copy is None and self._cache.can_fork(num_tokens):
                other.tables, sources = self._cache.fork(sequence.tables, num_tokens)
                for group, source in enumerate(sources):
                    if source is not None:
                        copies[group][0].append(source)
                        copies[group][1].append(other.tables.groups[group].blocks[-1])
                continue
            if host_copy is None:
                tables = sequence.tables.groups
                host_copy = [self._store.read_blocks(table.held, group) for group, table in enumerate(tables)]
            other.host_copy = host_copy
        for group, (half_full, own) in copies.items():
            self._store.copy_blocks(half_full, own, group)
