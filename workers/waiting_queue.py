"""The requests of a decode worker from when they come until they decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from workers.handoff.receiving import RemotePrefill
from workers.scheduling.decode_scheduler import DecodeBatch
from workers.scheduling.local_prefill import LocalPrefill
from workers.scheduling.lost_room import Need
from workers.scheduling.sequence import Sequence


class DecodeQueue:
    """One queue, wherever a prompt is computed.

    Blocks and places in the batch are given strictly in the order of arrival: neither prompts that are computed here
    nor those that come from elsewhere overtake the others, and nobody is admitted while a sequence that made room is
    still to come back. What the prompts that are computed here take of a step is bounded by its token budget.

    Args:
        batch: where they decode.
        remote: those whose prompts come from prefill workers, once admitted.
        local: those whose prompts are computed here, once admitted.
    """

    def __init__(self, batch: DecodeBatch, remote: RemotePrefill, local: LocalPrefill) -> None:
        self._batch = batch
        self._remote = remote
        self._local = local
        self._waiting: deque[Sequence] = deque()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting or sequence in self._side_of(sequence)

    @property
    def size(self) -> int:
        """Sequences that wait for blocks or for their KV cache."""
        return len(self._waiting) + self._remote.num_admitted + self._local.num_admitted

    @property
    def num_tokens(self) -> int:
        """Tokens of their prompts that have neither arrived nor been computed."""
        waiting = sum(len(sequence.request.prompt_token_ids) for sequence in self._waiting)
        return waiting + self._remote.num_waiting_tokens + self._local.num_waiting_tokens

    @property
    def can_admit(self) -> bool:
        """Whether there is room for the first one that waits."""
        if not self._waiting or self._batch.num_preempted:
            return False
        taken = self._batch.size + self._remote.num_places + self._local.num_places
        first = self._waiting[0]
        return taken + first.num_samples <= self._batch.max_num_seqs and self._side_of(first).fits(first)

    def needs(self) -> Iterator[Need[Sequence]]:
        """What those wait for who have not been admitted, in order."""
        for sequence in self._waiting:
            yield self._side_of(sequence).need(sequence)

    def add(self, sequence: Sequence) -> None:
        """Put it at the end."""
        self._waiting.append(sequence)

    def admit(self) -> None:
        """Give blocks to as many as there is room for."""
        while self.can_admit:
            sequence = self._waiting.popleft()
            self._side_of(sequence).admit(sequence)

    def remove(self, sequence: Sequence) -> None:
        """One that is here is not wanted any more; its blocks follow when they are safe."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._side_of(sequence).remove(sequence)

    def _side_of(self, sequence: Sequence) -> LocalPrefill | RemotePrefill:
        return self._local if sequence.request.peer_engine is None else self._remote
