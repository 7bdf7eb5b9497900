"""Prompts that prefill workers compute for a decode worker: it grants them blocks and waits for their KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kv_transfer.connector import HandoffFailed, HandoffReceived, HandoffReleased, KVConnector
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff_key import HandoffKey
from workers.errors import HandoffError
from workers.handoff.share_exchange import Exchange
from workers.kv_cache.manager import KVCacheManager
from workers.scheduling.lost_room import Need
from workers.scheduling.sequence import Sequence
from workers.scheduling.sequence_blocks import SequenceBlocks


@dataclass(frozen=True)
class Arrival:
    """A handoff is over for whom it was for.

    Attributes:
        sequence: its blocks are its owner's from now on, if it has a first token.
        first_tokens: which the prefill worker has told the client, of each sample; or why there are none.
    """

    sequence: Sequence
    first_tokens: tuple[int, ...] | HandoffError


class RemotePrefill:
    """Who is admitted when is the worker's business, which has other requests for the same blocks.

    What is granted may be written to until the handoff is over, whoever still wants it.

    Args:
        connector: with the cache registered.
        cache: which blocks of it belong to whom.
        kept: what is in them.
        exchange: has what ranks that keep the same were each sent a share of; None: each is sent all that it keeps.
    """

    def __init__(
        self, connector: KVConnector, cache: KVCacheManager, kept: SequenceBlocks, exchange: Exchange | None = None
    ) -> None:
        self._connector = connector
        self._exchange = exchange
        self._cache = cache
        self._kept = kept
        self._expected: dict[HandoffKey, Sequence] = {}
        self._wanted: dict[Sequence, HandoffKey] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._wanted

    @property
    def num_admitted(self) -> int:
        """Prompts that have blocks, and wait for their cache."""
        return len(self._wanted)

    @property
    def num_places(self) -> int:
        """Sequences that they will be in the batch."""
        return sum(sequence.num_samples for sequence in self._wanted)

    @property
    def expected(self) -> tuple[Sequence, ...]:
        """Those whose blocks somebody may still write to, whoever still wants them."""
        return tuple(self._expected.values())

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of these."""
        return sum(len(sequence.request.prompt_token_ids) for sequence in self._wanted)

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks that are granted for somebody who waits for them."""
        primary = self._cache.primary
        return sum(
            self._cache.num_held(sequence.tables) - sequence.num_cached_blocks[primary] for sequence in self._wanted
        )

    @property
    def num_quarantined_blocks(self) -> int:
        """Blocks of the primary group that nobody waits for any more, and somebody may still write to."""
        return sum(self._cache.num_held(sequence.tables) for sequence in self._unwanted)

    @property
    def quarantined(self) -> list[set[int]]:
        """These blocks, of each group."""
        return self._cache.blocks_of(sequence.tables for sequence in self._unwanted)

    @property
    def _unwanted(self) -> list[Sequence]:
        return [sequence for sequence in self._expected.values() if sequence not in self._wanted]

    @property
    def in_flight(self) -> bool:
        """Whether somebody may still write to a block."""
        return bool(self._expected)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for its prompt and its first tokens now."""
        return self._kept.fits(sequence)

    def need(self, sequence: Sequence) -> Need[Sequence]:
        """What `fits` asks for."""
        num_tokens = len(sequence.request.prompt_token_ids)
        blocks = self._cache.blocks_behind(num_tokens, num_tokens + 1, sequence.num_samples)
        return Need(sequence, blocks, sequence.hashes)

    def admit(self, sequence: Sequence) -> None:
        """Take the blocks of a prompt that `fits`, and grant its prefill worker those whose content is not here."""
        request = sequence.request
        if request.peer_engine is None:
            raise ValueError(f"{request.log_name} has no prefill worker")
        self._kept.take(sequence)
        written = None if self._exchange is None else self._exchange.written
        key = self._connector.expect(request.handoff_id, request.peer_engine, self._granted(sequence), written)
        self._expected[key], self._wanted[sequence] = sequence, key

    def _granted(self, sequence: Sequence) -> list[GroupBlocks]:
        """By cache group, the blocks whose content was not here when the prompt was admitted."""
        return [
            GroupBlocks(first, table.blocks[first:])
            for first, table in zip(self._kept.granted_from(sequence), sequence.tables.groups, strict=True)
        ]

    def remove(self, sequence: Sequence) -> None:
        """Nobody wants it any more; its blocks follow when they are safe."""
        self._connector.cancel(self._wanted.pop(sequence))
        self._kept.give_back_cached(sequence)

    def _complete(self, sequence: Sequence) -> None:
        """Every rank has its share: now each gets the others'."""
        if self._exchange is not None:
            for group, granted in enumerate(self._granted(sequence)):
                self._exchange.complete(group, granted.block_ids)

    def poll(self) -> Iterator[Arrival]:
        """What has come to an end since the last call."""
        for event in self._connector.poll():
            match event:
                case HandoffReceived(key, first_token, other_tokens):
                    sequence = self._expected.pop(key)
                    if self._wanted.pop(sequence, None) is not None:
                        self._complete(sequence)
                        self._kept.received(sequence)
                        yield Arrival(sequence, (first_token, *other_tokens))
                    else:  # aborted while the last part was on its way
                        self._cache.release(sequence.tables)
                case HandoffFailed(key, reason):
                    sequence = self._expected[key]
                    if self._wanted.pop(sequence, None) is not None:
                        yield Arrival(sequence, HandoffError(reason))
                    self._kept.give_back_cached(sequence)
                case HandoffReleased(key):
                    self._cache.release(self._expected.pop(key).tables)
                case _:
                    raise TypeError(f"a decode worker has no use for {event}")
